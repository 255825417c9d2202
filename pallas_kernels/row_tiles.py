"""Attention a tile of rows at a time: a tile stays in the CPU's cache, and of a window no more than it is computed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

ROWS_PER_TILE = 32


def padded_rows(rows: int) -> int:
    """Rows that tiles cover: `rows`, rounded up to whole tiles if there is more than one."""
    return rows if rows <= ROWS_PER_TILE else -(-rows // ROWS_PER_TILE) * ROWS_PER_TILE


def over_row_tiles(attend: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array) -> jax.Array:
    """Apply attend(first row, tile of q [batch, tile, heads, qk_dim]) to all rows of q, one tile after another.

    The last tile is filled up with rows of zeros, whose results are dropped. For gradients a tile is computed again
    rather than kept.
    """
    batch, rows = q.shape[:2]
    if rows <= ROWS_PER_TILE:
        return attend(jnp.int32(0), q)
    padded = jnp.pad(q, ((0, 0), (0, padded_rows(rows) - rows), (0, 0), (0, 0)))
    tiles = padded.reshape(batch, -1, ROWS_PER_TILE, *q.shape[2:]).swapaxes(0, 1)
    first = jnp.arange(tiles.shape[0], dtype=jnp.int32) * ROWS_PER_TILE
    out = jax.lax.map(jax.checkpoint(lambda tile: attend(*tile)), (first, tiles))
    return out.swapaxes(0, 1).reshape(batch, padded.shape[1], *out.shape[3:])[:, :rows]
