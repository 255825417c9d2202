"""Routed rows laid out for a grouped matmul: by expert, each expert's rows together and cut into tiles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ROW_ALIGNMENT = 8
"""An expert's rows begin at a multiple of it, so that no more than seven rows of an expert are filling."""


class RaggedRows(NamedTuple):
    """Where every (token, expert) pair stands among rows sorted by expert."""

    token: jax.Array
    """[rows] int32: whose row it is; the number of tokens for filling."""
    row: jax.Array
    """[tokens, top_k] int32: where a pair's row stands; the number of rows if the expert is elsewhere."""
    tile_expert: jax.Array
    """[tiles] int32."""
    tile_first: jax.Array
    """[tiles] int32: the tile's first row."""
    tile_rows: jax.Array
    """[tiles] int32: its rows, a multiple of `ROW_ALIGNMENT`."""
    count: jax.Array
    """[1] int32: tiles that there are; what the arrays hold beyond them means nothing."""

    def gather(self, x: jax.Array) -> jax.Array:
        """Rows [rows, hidden] of x [tokens, hidden]; filling is zero."""
        return x.at[self.token].get(mode="fill", fill_value=0)

    def combine(self, y: jax.Array, weights: jax.Array) -> jax.Array:
        """Sums [tokens, hidden] float32 of rows y [rows, hidden] by weights [tokens, top_k] float32."""
        mine = y.at[self.row].get(mode="fill", fill_value=0)
        return jnp.einsum("tkh,tk->th", mine.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST)


def ragged_rows(ids: jax.Array, experts: int, tile: int) -> RaggedRows:
    """Sort pairs by expert.

    Args:
        ids: [tokens, top_k] int32; experts numbered `experts` and more are elsewhere.
        experts: Their number.
        tile: Rows of a tile, a multiple of `ROW_ALIGNMENT`; the arrays have room for one more tile than they need, so
            that a tile may be read whole wherever it begins.
    """
    tokens, top_k = ids.shape
    pairs = ids.size
    filled = min(experts, pairs)  # experts that can have rows
    rows = _aligned(pairs + filled * (ROW_ALIGNMENT - 1)) + tile
    tiles = min(pairs, -(-pairs // tile) + filled)

    flat = ids.reshape(-1)
    order = jnp.argsort(flat).astype(jnp.int32)
    sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)
    padded = _aligned(sizes)
    first, before = jnp.cumsum(padded) - padded, jnp.cumsum(sizes) - sizes
    of_pair = flat[order]
    known = jnp.minimum(of_pair, experts - 1)
    at = first[known] + jnp.arange(pairs, dtype=jnp.int32) - before[known]
    at = jnp.where(of_pair < experts, at, rows)
    token = jnp.full(rows, tokens, jnp.int32).at[at].set(order // top_k, mode="drop")
    row = jnp.zeros(pairs, jnp.int32).at[order].set(at).reshape(ids.shape)

    ends = jnp.cumsum(-(-padded // tile))
    number = jnp.arange(tiles, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, number, side="right"), experts - 1).astype(jnp.int32)
    within = (number - (ends[expert] - -(-padded[expert] // tile))) * tile
    return RaggedRows(token, row, expert, first[expert] + within, jnp.minimum(padded[expert] - within, tile), ends[-1:])


def _aligned[Number: (int, jax.Array)](n: Number) -> Number:
    return -(-n // ROW_ALIGNMENT) * ROW_ALIGNMENT
