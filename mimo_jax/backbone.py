"""The MiMo-V2 text backbone on one page: hybrid full / sliding-window attention, dense and mixture-of-experts MLPs.

Layers of one kind are stacked and run by `lax.scan` over consecutive rows of their stack, and runs of layers that
repeat by one more around them. The forward pass reads the caches and returns each layer's new keys and values;
committing them is the caller's decision.

Written for one device of a mesh: it has its parts of heads, experts and vocabulary, the rows of its own sequences, and
sums with the others where a topology's cuts say so. Without a mesh it has everything, and there is nothing to sum.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.attention import KV, Attention
from mimo_jax.cache import BackboneCache, Documents, EarlierParts, PagedKV, PartsOfSequences, RingKV
from mimo_jax.config import AttentionKind, BackboneConfig, LayerKind
from mimo_jax.layer_loops import Run, Stretch, stretches
from mimo_jax.layers import Layer, array, declare, linear, over_layers, rms_norm, swiglu, weight
from mimo_jax.moe import MoE
from sharding.topology import Topology


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BackboneOutput:
    """What one pass over a block of rows gives."""

    hidden: jax.Array
    """[batch, rows, hidden]: the residual stream after the last layer, before the final norm."""
    captured: jax.Array
    """[batch, rows, captured layers, hidden]: the residual stream after each captured layer."""
    kv: dict[AttentionKind, KV]
    """Per attention kind, the rows' keys and values [layers of that kind, batch, rows, kv_heads, dim]."""


class DenseMLP(nnx.Module):
    """SwiGLU MLPs of the dense layers of one kind, stacked."""

    def __init__(self, inner: int, hidden: int, layers: int, dtype: jax.typing.DTypeLike, topology: Topology):
        self.columns = topology.cut("mlp")
        self.gate = declare((layers, inner, hidden), ("layers", "mlp", "embed"), dtype)
        self.up = declare((layers, inner, hidden), ("layers", "mlp", "embed"), dtype)
        self.down = declare((layers, hidden, inner), ("layers", "embed", "mlp"), dtype)

    def __call__(self, x: jax.Array, layer: Layer, wanted: jax.Array | None = None) -> jax.Array:
        """Map x [..., hidden] to [..., hidden], whichever rows are wanted: all read the same weights."""
        return self.columns.sum(swiglu(x, weight(self.gate, layer), weight(self.up, layer), weight(self.down, layer)))


class DecoderLayers(nnx.Module):
    """The decoder layers of one kind, stacked."""

    def __init__(self, config: BackboneConfig, kind: LayerKind, dtype: jax.typing.DTypeLike, topology: Topology):
        hidden, layers = config.hidden_size, len(config.layers_of(kind))
        self.eps = config.rms_eps
        self.attention_norm = declare((layers, hidden), ("layers", "embed"), dtype)
        self.attention = Attention(config.attention(kind.attention), hidden, layers, dtype, topology)
        self.mlp_norm = declare((layers, hidden), ("layers", "embed"), dtype)
        if kind.mlp == "dense":
            self.mlp = DenseMLP(config.dense_intermediate, hidden, layers, dtype, topology)
        else:
            self.mlp = MoE(config.moe, hidden, config.router_dtype, layers, dtype, topology)

    def __call__(
        self,
        x: jax.Array,
        layer: Layer,
        cache: PagedKV | RingKV | EarlierParts | Documents,
        cache_layer: Layer,
        lengths: jax.Array,
        counts: jax.Array | None,
    ) -> tuple[jax.Array, KV]:
        """One layer over rows x [batch, rows, hidden]: the new residual stream, and the rows' keys and values."""
        positions = cache.positions if isinstance(cache, Documents) else lengths[:, None] + jnp.arange(x.shape[1])
        attention = self.attention
        n = rms_norm(x, array(self.attention_norm, layer), self.eps)
        q = attention.rotate(attention.queries(n, layer), positions)
        k, v = attention.keys_values(n, layer)
        kv = attention.rotate(k, positions), v
        x = x + attention.attend(q, kv, layer, cache, cache_layer, lengths)
        n = rms_norm(x, array(self.mlp_norm, layer), self.eps)
        wanted = None if counts is None else (jnp.arange(x.shape[1]) < counts[:, None]).reshape(-1)
        return x + self.mlp(n.reshape(-1, n.shape[-1]), layer, wanted).reshape(n.shape), kv


class Backbone(nnx.Module):
    """The text backbone: embedding, decoder layers, final norm, LM head."""

    def __init__(self, config: BackboneConfig, dtype: jax.typing.DTypeLike, topology: Topology = Topology()):
        self.config, self.topology, self.vocabulary = config, topology, topology.cut("vocab")
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding = declare(vocabulary, ("vocab", "embed"), dtype)
        self.layers = nnx.Dict({kind.name: DecoderLayers(config, kind, dtype, topology) for kind in config.kinds})
        self.final_norm = declare((config.hidden_size,), ("embed",), dtype)
        self.lm_head = declare(vocabulary, ("vocab", "embed"), dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Ids [...] int32 to rows [..., hidden]."""
        mine = array(self.embedding)
        at = self.vocabulary.local(self.vocabulary.gather_rows(tokens), mine.shape[0])
        return self.vocabulary.sum_rows(mine.at[at].get(mode="fill", fill_value=0))

    def __call__(
        self,
        tokens: jax.Array,
        cache: BackboneCache | PartsOfSequences | Documents,
        capture: tuple[int, ...] = (),
        counts: jax.Array | None = None,
    ) -> BackboneOutput:
        """Run rows that follow what the cache holds.

        Args:
            tokens: [batch, rows] int32; row r of sequence b stands at position `cache.lengths[b]` + r. Rows see the
                committed positions and earlier rows, so rows after the valid ones of a sequence change nothing.
            cache: Committed keys and values, and the lengths; or what documents the rows are of.
            capture: Numbers of the layers after which the residual stream is captured, increasing.
            counts: [batch] int32: how many rows of each sequence are wanted; default: all. What comes of those after
                them means nothing, and no expert is read for them.
        """
        x = self.embed(tokens)
        captured: list[jax.Array] = []
        new: dict[AttentionKind, list[KV]] = {"full": [], "swa": []}
        for stretch in stretches(self.config.layers, capture):
            x, ends, kvs = self._stretch(stretch, x, cache, counts)
            captured += ends
            for kind, kv in kvs.items():
                new[kind].append(kv)
        return BackboneOutput(
            hidden=x,
            captured=jnp.stack(captured, axis=2) if captured else x[:, :, None, :][:, :, :0],
            kv={k: jax.tree.map(lambda *parts: jnp.concatenate(parts), *kvs) for k, kvs in new.items() if kvs},
        )

    def _stretch(
        self,
        stretch: Stretch,
        x: jax.Array,
        cache: BackboneCache | PartsOfSequences | Documents,
        counts: jax.Array | None,
    ) -> tuple[jax.Array, list[jax.Array], dict[AttentionKind, KV]]:
        """Rows x through a stretch: the new residual stream, those captured, and [layers, batch, rows, ...] KV."""
        first, second = stretch[0], stretch[:2][-1]
        kept = [any(run.captured for run in same) for same in zip(*stretch, strict=True)]

        def once(x: jax.Array, time: Layer):
            ends: list[jax.Array | None] = []
            new: dict[AttentionKind, list[KV]] = {}
            for run, next_time, keep in zip(first, second, kept, strict=True):
                x, kv = self._run(run.repeated(next_time, time), x, cache, counts)
                new.setdefault(run.kind.attention, []).append(kv)
                ends.append(x if keep else None)
            joined = {kind: jax.tree.map(lambda *parts: jnp.concatenate(parts), *kvs) for kind, kvs in new.items()}
            return x, (ends, joined)

        x, (ends, new) = over_layers(once, x, len(stretch), self.layers[first[0].kind.name].attention_norm)
        captured = [
            end[i]
            for i, time in enumerate(stretch)
            for run, end in zip(time, ends, strict=True)
            if run.captured and end is not None
        ]
        return x, captured, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), new)

    def _run(
        self, run: Run, x: jax.Array, cache: BackboneCache | PartsOfSequences | Documents, counts: jax.Array | None
    ) -> tuple[jax.Array, KV]:
        """Rows x through a run of layers: the new residual stream, and [layers of the run, batch, rows, ...] KV."""
        layers, committed = self.layers[run.kind.name], cache.kv[run.kind.attention]

        # in training, attention is computed again rather than kept; without gradients this changes nothing
        again = partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)

        def layer(x: jax.Array, i: Layer) -> tuple[jax.Array, KV]:
            row, in_cache = run.first + i, run.first_in_cache + i
            return again(lambda x: layers(x, row, committed, in_cache, cache.lengths, counts))(x)

        return over_layers(layer, x, run.count, layers.attention_norm)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and LM head: hidden [batch, ..., hidden] to logits [batch, ..., vocab] float32."""
        normed = rms_norm(hidden, array(self.final_norm), self.config.rms_eps)
        return self.head(normed)

    def head(self, normed: jax.Array) -> jax.Array:
        """The LM head alone, which the drafter shares: normed rows [batch, ..., hidden] to logits [batch, ..., vocab]
        float32. On a mesh, to those of the ids that this device samples from (the logical axis `logits`).
        """
        logits = linear(self.vocabulary.gather_rows(normed), weight(self.lm_head))
        return self.vocabulary.swap_rows(logits.astype(jnp.float32))
