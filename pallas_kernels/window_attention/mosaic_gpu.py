"""Window attention on Hopper: keys are read where they lie in the ring, and those of the block follow on.

Floors of a call, at 4.3 TB/s and 780 TFLOP/s (5.9 on one multiprocessor): a sequence and KV head have one program,
which reads slots * (qk_dim + v_dim) * 2 bytes of ring, and moves (qk_dim + v_dim) * 2 bytes for each of its rows and
heads. Verification of 8 rows with 16 heads a KV head reads 87 KB of ring, moves 82 KB of rows and multiplies 128 rows
by 3 tiles of 64 keys: 2.7 us in one wave of up to 132 programs, whose bytes take 5 us when they are as many. A
drafter's ring of 1032 slots is 528 KB and 17 tiles: 12 us of products in a program, and 18 us of bytes for 132.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_attention import ALIGNMENT, KEYS, NOWHERE, KeyTiles, Piece, attend, check_heads


@partial(jax.jit, static_argnames=("visible_keys", "causal", "interpret"))  # layers share what it lowers to
def window_attention(
    q: jax.Array,
    ring_k: jax.Array,
    ring_v: jax.Array,
    block_k: jax.Array,
    block_v: jax.Array,
    layer: jax.Array | int,
    lengths: jax.Array,
    sink: jax.Array | None,
    *,
    visible_keys: int | None,
    causal: bool,
    interpret: Any = False,
) -> jax.Array:
    """See `pallas_kernels.window_attention`; `interpret` as in `mosaic_attention.attend`.

    Slots and the block's rows are numbered together, slots first, and cut into tiles. One tile may hold the last slots
    and the first rows, so every tile is made of two pieces that meet where these do.
    """
    check_heads(q, ring_k=ring_k, ring_v=ring_v, block_k=block_k, block_v=block_v)
    (_, batch, slots), rows = ring_k.shape[:3], q.shape[1]
    if slots % ALIGNMENT or not slots:
        raise NotImplementedError(f"a ring must have a multiple of {ALIGNMENT} slots to be read in tiles, not {slots}")
    full, rest = divmod(slots, KEYS)  # tiles of slots alone, and slots that share theirs with rows
    sizes = [size for size in (rest, KEYS - rest) if size]

    def tiles(layer: Any, lengths: Any, sequence: jax.Array, first_row: jax.Array, end_row: jax.Array) -> KeyTiles:
        length = lengths[sequence]
        used = jnp.minimum(lax.div(length + KEYS - 1, KEYS), full)
        first = jnp.int32(full)
        if visible_keys is not None:
            used = jnp.where(first_row < visible_keys - 1, used, 0)
            first = jnp.maximum(lax.div(jnp.maximum(slots + first_row - visible_keys + 1, 0), KEYS), full)
        end = lax.div(slots + (end_row if causal else rows) + KEYS - 1, KEYS)
        newest = lax.rem(length, slots)  # the slot after the newest position's

        def number(i: jax.Array) -> jax.Array:
            return (i + jnp.where(i < used, 0, first - used)) * KEYS

        def pieces(i: jax.Array) -> list[tuple[int, Piece]]:
            at, found = number(i), []
            for size in sizes:
                found.append((size, Piece(at < slots, layer[0] * batch + sequence, at, at - slots)))
                at += size
            return found

        def positions(i: jax.Array, key: jax.Array) -> jax.Array:
            n = number(i) + key
            in_ring = n - newest - jnp.where(n < newest, 0, slots)  # not committed below -length
            in_ring = jnp.where(in_ring >= -length, in_ring, NOWHERE)
            return jnp.where(n < slots, in_ring, n - slots)

        return KeyTiles(used + end - first, pieces, positions)

    return attend(
        q,
        (ring_k.reshape(-1, *ring_k.shape[2:]), ring_v.reshape(-1, *ring_v.shape[2:])),
        (block_k, block_v),
        (jnp.reshape(layer, 1), lengths),
        sink,
        tiles,
        len(sizes),
        visible_keys=visible_keys,
        causal=causal,
        name="window_attention",
        interpret=interpret,
    )
