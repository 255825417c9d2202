"""Paged attention on Hopper: keys are read where they lie in pages, by several programs where there are few rows.

Floors of a call, at 4.3 TB/s and 780 TFLOP/s: a committed position costs (qk_dim + v_dim) * 2 bytes a KV head, 640 of
the release's, and 2 * (qk_dim + v_dim) FLOPs a row and head. Up to about 180 rows and heads a KV head, bytes take
longer: 20 us for 131,072 positions of one sequence and KV head, 156 us for 2**20. Verification of 8 rows with 16 heads
a KV head keeps the tensor cores busy for 70% of that. Where keys are split, programs write their parts of the result in
float32, up to 132 * 128 * v_dim * 4 bytes in all: 8.7 MB, or 2 us each way, and a few small kernels merge them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import MULTIPROCESSORS
from pallas_kernels.mosaic_attention import ALIGNMENT, KEYS, NOWHERE, KeyTiles, Piece, attend, check_heads, programs

LEAST_TILES = 4
"""Of keys that a program is started for."""


@partial(jax.jit, static_argnames=("splits", "interpret"))  # layers share what it lowers to
def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_k: jax.Array,
    block_v: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    lengths: jax.Array,
    sink: jax.Array | None,
    *,
    splits: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `pallas_kernels.paged_attention`.

    Tiles of committed keys come first, then tiles of the block's.

    Args:
        splits: Programs that share a sequence's keys; None: as many as keep the GPU busy.
        interpret: As in `mosaic_attention.attend`.
    """
    check_heads(q, k_pages=k_pages, v_pages=v_pages, block_k=block_k, block_v=block_v)
    (_, pages, page_size, kv_heads), columns = k_pages.shape[:4], page_table.shape[1]
    if page_size % ALIGNMENT or (page_size % KEYS and KEYS % page_size):
        raise NotImplementedError(f"pages must hold 8, 16, 32 or a multiple of {KEYS} positions, not {page_size}")
    if not columns:
        raise NotImplementedError("there must be pages; rows without a past are not what this kernel is for")
    if splits is None:
        wanted = MULTIPROCESSORS // programs(q, kv_heads)
        splits = max(1, min(wanted, columns * page_size // (KEYS * LEAST_TILES)))
    size = min(page_size, KEYS)

    def tiles(layer: Any, table: Any, lengths: Any, sequence: jax.Array, _: jax.Array, end_row: jax.Array) -> KeyTiles:
        length = lengths[sequence]
        committed = lax.div(length + KEYS - 1, KEYS)

        def pieces(i: jax.Array) -> list[tuple[int, Piece]]:
            found = []
            for offset in range(0, KEYS, size):
                at = i * KEYS + offset
                # a tile may reach beyond the table, where nothing is committed
                page = table[sequence, jnp.minimum(lax.div(at, page_size), columns - 1)]
                place = layer[0] * pages + page
                found.append((size, Piece(i < committed, place, lax.rem(at, page_size), at - committed * KEYS)))
            return found

        def positions(i: jax.Array, key: jax.Array) -> jax.Array:
            at = i * KEYS + key
            past = jnp.where(at < length, at - length, NOWHERE)
            return jnp.where(jnp.broadcast_to(i < committed, key.shape), past, at - committed * KEYS)

        return KeyTiles(committed + lax.div(end_row + KEYS - 1, KEYS), pieces, positions)

    return attend(
        q,
        (k_pages.reshape(-1, *k_pages.shape[2:]), v_pages.reshape(-1, *v_pages.shape[2:])),
        (block_k, block_v),
        (jnp.reshape(layer, 1), page_table, lengths),
        sink,
        tiles,
        KEYS // size,
        visible_keys=None,
        causal=True,
        splits=splits,
        name="paged_attention",
        interpret=interpret,
    )
