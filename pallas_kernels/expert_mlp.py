"""SwiGLU experts over routed tokens: only the experts that some token chose are touched, one tile of rows at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import mxfp4
from pallas_kernels.precision import matmul_precision

MIN_TILE, MAX_TILE = 8, 128


def expert_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    expert: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    experts: int,
) -> jax.Array:
    """Sum over each token's experts of weight * down(silu(gate x) * up x), accumulated in float32.

    Args:
        x: [tokens, hidden].
        ids: [tokens, top_k] int32, each token's experts.
        weights: [tokens, top_k] float32, their routing weights.
        expert: Given an expert's id (scalar int32), its gate and up [2, inner, hidden] and its down [hidden, inner] in
            x's dtype. Called once an expert and tile of rows, so packed weights are expanded one expert at a time.
        experts: Their number.

    Returns:
        [tokens, hidden] in x's dtype. No token is dropped, whatever the routing.
    """
    tokens, top_k = ids.shape
    pairs = tokens * top_k
    tile = MIN_TILE
    while tile < MAX_TILE and tile * experts < pairs:
        tile *= 2

    flat = ids.reshape(-1)
    order = jnp.argsort(flat)  # pairs by expert
    sizes = jnp.bincount(flat, length=experts)
    ends = jnp.cumsum(sizes)
    tile_ends = jnp.cumsum((sizes + tile - 1) // tile)  # tiles of the experts up to and including this one

    def add_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        e = jnp.searchsorted(tile_ends, i, side="right")
        first = ends[e] - sizes[e] + (i - tile_ends[e] + (sizes[e] + tile - 1) // tile) * tile
        at = first + jnp.arange(tile)
        pair = order[jnp.minimum(at, pairs - 1)]
        token = jnp.where(at < ends[e], pair // top_k, tokens)  # out of range: dropped
        gate_up, down = expert(e)
        rows = x.at[token].get(mode="fill", fill_value=0)
        gate, up = _product("ti,goi->gto", rows, gate_up)
        y = _product("ti,oi->to", (jax.nn.silu(gate) * up).astype(x.dtype), down)
        scaled = y.astype(jnp.float32) * weights.reshape(-1)[pair][:, None]
        return out.at[token].add(scaled, mode="drop")

    out = jax.lax.fori_loop(0, tile_ends[-1], add_tile, jnp.zeros(x.shape, jnp.float32))
    return out.astype(x.dtype)


def mxfp4_expert_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up_codes: jax.Array,
    gate_up_scales: jax.Array,
    down_codes: jax.Array,
    down_scales: jax.Array,
    *,
    layer: jax.Array,
) -> jax.Array:
    """`expert_mlp` on stacked MXFP4 weights, of which only the chosen experts of one layer are read.

    Args:
        x: [tokens, hidden].
        ids: [tokens, top_k] int32.
        weights: [tokens, top_k] float32.
        gate_up_codes: [layers, experts, 2, inner, hidden / 2] uint8; gate is 0, up is 1.
        gate_up_scales: [layers, experts, 2, inner, hidden / 32] uint8.
        down_codes: [layers, experts, hidden, inner / 2] uint8.
        down_scales: [layers, experts, hidden, inner / 32] uint8.
        layer: Scalar int32: the row of the leading axis to use.

    Returns:
        [tokens, hidden] in x's dtype.
    """

    def expert(e: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate_up = mxfp4.decode(gate_up_codes[layer, e], gate_up_scales[layer, e], x.dtype)
        return gate_up, mxfp4.decode(down_codes[layer, e], down_scales[layer, e], x.dtype)

    return expert_mlp(x, ids, weights, expert, gate_up_codes.shape[1])


def _product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    y = jnp.einsum(spec, x, w, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
