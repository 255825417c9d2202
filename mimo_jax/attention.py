"""Attention of the three kinds: full over pages, sliding-window over a ring, and the drafter's block.

All three read keys that are already committed to a cache, plus those of the rows being computed; none writes.
"""

import jax
from flax import nnx

from mimo_jax.cache import Documents, EarlierParts, PagedKV, RingKV, SequenceKV
from mimo_jax.config import AttentionConfig
from mimo_jax.layers import Layer, array, declare, linear, rope, weight
from pallas_kernels.block_attention import block_attention
from pallas_kernels.packed_attention import packed_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.window_attention import window_attention
from sharding.topology import Topology

KV = tuple[jax.Array, jax.Array]
"""Keys [batch, rows, kv_heads, qk_dim] after RoPE and values [batch, rows, kv_heads, v_dim] after the value scale."""


class Attention(nnx.Module):
    """Projections of the attention layers of one kind, stacked; weights [layers, out, in].

    A device of a mesh has some of the heads.
    """

    def __init__(
        self, config: AttentionConfig, hidden: int, layers: int, dtype: jax.typing.DTypeLike, topology: Topology
    ):
        def projection(rows: int, axis: str) -> nnx.Param:
            return declare((layers, rows, hidden), ("layers", axis, "embed"), dtype)

        self.config, self.heads = config, topology.cut("heads")
        self.q = projection(config.heads * config.qk_dim, "heads")
        self.k = projection(config.kv_heads * config.qk_dim, "kv_heads")
        self.v = projection(config.kv_heads * config.v_dim, "kv_heads")
        self.o = declare((layers, hidden, config.heads * config.v_dim), ("layers", "embed", "heads"), dtype)
        if config.sink:
            self.sink = declare((layers, config.heads), ("layers", "heads"), "float32")

    def queries(self, x: jax.Array, layer: Layer) -> jax.Array:
        """Project x [batch, rows, hidden] to queries [batch, rows, heads, qk_dim], not yet rotated."""
        return linear(x, weight(self.q, layer)).reshape(*x.shape[:2], -1, self.config.qk_dim)

    def keys_values(self, x: jax.Array, layer: Layer) -> KV:
        """Project x [batch, rows, hidden] to keys, not yet rotated, and scaled values."""
        k = linear(x, weight(self.k, layer)).reshape(*x.shape[:2], -1, self.config.qk_dim)
        v = linear(x, weight(self.v, layer)).reshape(*x.shape[:2], -1, self.config.v_dim)
        return k, v * self.config.value_scale

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """RoPE with this kind's base on this kind's rotary width."""
        return rope(x, positions, self.config.rotary_dim, self.config.rope_theta)

    def attend(
        self,
        q: jax.Array,
        kv: KV,
        layer: Layer,
        cache: PagedKV | RingKV | SequenceKV | EarlierParts | Documents,
        cache_layer: Layer,
        lengths: jax.Array,
        causal: bool = True,
    ) -> jax.Array:
        """Attend to the committed keys of a cache layer and to the block's own, and project the result.

        Args:
            q: [batch, rows, heads, qk_dim], rotated.
            kv: The rows' own keys and values.
            layer: This layer's row in the stacked parameters.
            cache: Where committed keys lie. Of a `SequenceKV`, a batch of blocks reads the positions before each; with
                `Documents` there are none, and rows see earlier ones of their own document.
            cache_layer: This layer's row in the cache.
            lengths: [batch] int32, committed positions; row r stands at position lengths + r.
            causal: Whether a row sees only itself and earlier rows of its block.

        Returns:
            [batch, rows, hidden].
        """
        config = self.config
        sink = array(self.sink, layer) if config.sink else None
        match cache:
            case PagedKV():
                out = paged_attention(
                    q, cache.k, cache.v, *kv, layer=cache_layer, page_table=cache.table, lengths=lengths, sink=sink
                )
            case RingKV():
                out = window_attention(
                    q,
                    cache.k,
                    cache.v,
                    *kv,
                    layer=cache_layer,
                    lengths=lengths,
                    visible_keys=config.visible_keys,
                    causal=causal,
                    sink=sink,
                )
            case SequenceKV():
                out = block_attention(
                    q,
                    cache.k,
                    cache.v,
                    *kv,
                    layer=cache_layer,
                    anchors=cache.starts + lengths,
                    visible_keys=config.visible_keys,
                    causal=causal,
                    sink=sink,
                    first=cache.first,
                    starts=cache.starts,
                )
            case EarlierParts():
                out = window_attention(
                    q,
                    *cache.ring(kv, config.visible_keys),
                    *kv,
                    layer=0,
                    lengths=lengths,
                    visible_keys=config.visible_keys,
                    causal=causal,
                    sink=sink,
                )
            case Documents():
                out = packed_attention(q, *kv, positions=cache.positions, visible_keys=config.visible_keys, sink=sink)
        return self.heads.sum(linear(out.reshape(*out.shape[:2], -1), weight(self.o, layer)))
