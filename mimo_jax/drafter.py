"""The DFlash drafter on one page: it fills a block of masked positions in one pass (arXiv 2602.06036).

Its context is not text but features: the backbone's residual stream after a few layers. From each position's feature
every drafter layer makes one key and one value, once, when the position is committed. A block is the anchor's embedding
followed by mask vectors; its rows see the context and each other, and row r predicts the token at its own position.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.attention import KV, Attention
from mimo_jax.cache import RingKV, SequenceKV
from mimo_jax.config import DrafterConfig
from mimo_jax.layers import Layer, array, declare, linear, over_layers, rms_norm, swiglu, weight
from sharding.topology import Topology


class Drafter(nnx.Module):
    """The drafter without embedding and LM head, which are its backbone's."""

    def __init__(self, config: DrafterConfig, dtype: jax.typing.DTypeLike, topology: Topology = Topology()):
        self.config, self.columns = config, topology.cut("draft_mlp")
        hidden, layers, inner = config.hidden_size, config.num_layers, config.intermediate
        captured = len(config.target_layer_ids)

        def norm(dim: int, axis: str) -> nnx.Param:
            return declare((layers, dim), ("layers", axis), dtype)

        self.mask_embedding = declare((hidden,), ("embed",), dtype)
        self.fc = declare((hidden, captured * hidden), ("embed", "features"), dtype)
        self.hidden_norm = declare((hidden,), ("embed",), dtype)
        self.attention_norm = norm(hidden, "embed")
        self.attention = Attention(config.attention, hidden, layers, dtype, topology)
        self.q_norm = norm(config.attention.qk_dim, "head_dim")
        self.k_norm = norm(config.attention.qk_dim, "head_dim")
        self.mlp_norm = norm(hidden, "embed")
        self.gate = declare((layers, inner, hidden), ("layers", "draft_mlp", "embed"), dtype)
        self.up = declare((layers, inner, hidden), ("layers", "draft_mlp", "embed"), dtype)
        self.down = declare((layers, hidden, inner), ("layers", "embed", "draft_mlp"), dtype)
        self.final_norm = declare((hidden,), ("embed",), dtype)

    def context(self, captured: jax.Array, lengths: jax.Array) -> KV:
        """Keys and values that the features of some positions contribute to every layer.

        Args:
            captured: [batch, rows, captured layers, hidden] from the backbone.
            lengths: [batch] int32; row r stands at position lengths + r.

        Returns:
            Keys and values [layers, batch, rows, kv_heads, dim], to be committed to the drafter's ring.
        """
        batch, rows = captured.shape[:2]
        positions = lengths[:, None] + jnp.arange(rows)
        c = linear(captured.reshape(batch, rows, -1), weight(self.fc))
        c = rms_norm(c, array(self.hidden_norm), self.config.rms_eps)

        def layer(_: None, i: Layer) -> tuple[None, KV]:
            return None, self._keys_values(c, i, positions)

        return over_layers(layer, None, self.config.num_layers, self.attention_norm)[1]

    def __call__(self, anchor: jax.Array, ring: RingKV | SequenceKV, lengths: jax.Array) -> jax.Array:
        """Fill a block.

        Args:
            anchor: [batch, hidden]: the backbone's embedding of the known token at position `lengths`.
            ring: Context keys and values of the positions before it.
            lengths: [batch] int32.

        Returns:
            [batch, block_size, hidden] after the final norm; the backbone's LM head on row r >= 1 gives the token at
            position lengths + r. Row 0, the anchor's, predicts nothing.
        """
        config, attention = self.config, self.attention
        mask = jnp.broadcast_to(
            array(self.mask_embedding), (anchor.shape[0], config.block_size - 1, config.hidden_size)
        )
        block = jnp.concatenate([anchor[:, None].astype(mask.dtype), mask], axis=1)
        positions = lengths[:, None] + jnp.arange(config.block_size)

        def layer(x: jax.Array, i: Layer) -> tuple[jax.Array, None]:
            n = rms_norm(x, array(self.attention_norm, i), config.rms_eps)
            q = rms_norm(attention.queries(n, i), array(self.q_norm, i), config.rms_eps)
            q = attention.rotate(q, positions)
            kv = self._keys_values(n, i, positions)
            x = x + attention.attend(q, kv, i, ring, i, lengths, causal=config.block_causal)
            n = rms_norm(x, array(self.mlp_norm, i), config.rms_eps)
            mlp = swiglu(n, weight(self.gate, i), weight(self.up, i), weight(self.down, i))
            return x + self.columns.sum(mlp), None

        x, _ = over_layers(layer, block, config.num_layers, self.attention_norm)
        return rms_norm(x, array(self.final_norm), config.rms_eps)

    def _keys_values(self, x: jax.Array, layer: Layer, positions: jax.Array) -> KV:
        k, v = self.attention.keys_values(x, layer)
        k = rms_norm(k, array(self.k_norm, layer), self.config.rms_eps)
        return self.attention.rotate(k, positions), v
