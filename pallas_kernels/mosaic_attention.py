"""Attention on Hopper, in Pallas Mosaic GPU: one kernel for a ring's keys and for pages' keys.

The rows that share a KV head (rows of the block times heads of the group) are wgmma's first operand, in tiles of one or
two warpgroups. Keys come in tiles of 64, by TMA from where they lie into a ring of stages that a warpgroup of its own
keeps full; the others keep an online softmax. Where a tile lies and which positions it holds is all that the ops say
(`KeyTiles`). Several programs may share the keys of one tile of rows; what they find is merged afterwards.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import SHARED_BYTES, WARPGROUP_ROWS, shared

KEYS = 64
"""Of a tile."""
ALIGNMENT = 8
"""Rows of shared memory that TMA and wgmma address together: pieces of tiles begin and end at multiples."""
NOWHERE = 1 << 30
"""A relative position that no row sees."""
_MAX_STAGES = 4
_LOWEST = -1e30  # a logit that is as good as none, and of which differences are numbers
_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Piece(NamedTuple):
    """Rows of a tile of keys that lie in one place."""

    committed: jax.Array
    """Whether they are committed keys; otherwise they are the block's."""
    place: jax.Array
    """The row of the committed keys' leading axis."""
    start: jax.Array
    """The first key, on the second axis of committed keys."""
    block_start: jax.Array
    """The first key, on the second axis of the block's; what lies beyond its end is zero."""


@dataclass(frozen=True)
class KeyTiles:
    """The keys that a tile of rows of one sequence may see."""

    count: jax.Array
    """Tiles."""
    pieces: Callable[[jax.Array], Sequence[tuple[int, Piece]]]
    """The pieces of tile i in order, with their static numbers of keys; as many for every tile."""
    positions: Callable[[jax.Array, jax.Array], jax.Array]
    """Of keys [keys] of tile i: 0 for the block's first row, below for committed keys, NOWHERE where there is none."""


def attend(
    q: jax.Array,
    committed: tuple[jax.Array, jax.Array],
    block: tuple[jax.Array, jax.Array],
    scalars: Sequence[jax.Array],
    sink: jax.Array | None,
    tiles: Callable[..., KeyTiles],
    pieces: int,
    *,
    visible_keys: int | None,
    causal: bool,
    splits: int = 1,
    name: str,
    interpret: Any,
) -> jax.Array:
    """Attend from a block's rows to committed keys and to the block's own.

    Args:
        q: [batch, rows, heads, qk_dim] bfloat16.
        committed: Keys [places, keys, kv_heads, qk_dim] and values [places, keys, kv_heads, v_dim], bfloat16; keys a
            multiple of 8.
        block: Keys [batch, rows, kv_heads, qk_dim] and values [batch, rows, kv_heads, v_dim], bfloat16.
        scalars: Integer arrays that `tiles` reads.
        sink: [heads] float32 or None.
        tiles: Called in the kernel with `scalars`' references, the sequence, and the first row and the end of a tile of
            rows.
        pieces: Of every tile.
        visible_keys: As in `window_attention`.
        causal: As in `window_attention`.
        splits: Programs that share the keys of a tile of rows.
        name: Of the kernel.
        interpret: `plgpu.InterpretGPUParams` to run on a CPU. The interpreter does not know wgmma with an operand in
            registers: products are replaced by `dot_general`, all else is the kernel.

    Returns:
        [batch, rows, heads, v_dim] bfloat16.
    """
    batch, rows, heads, qk_dim = q.shape
    kv_heads, v_dim = committed[1].shape[2:]
    group = heads // kv_heads
    stacked = rows * group  # rows that share a KV head: row r of head h of the group is r * group + h
    tile = _tile(stacked)
    warpgroups, row_tiles = tile // WARPGROUP_ROWS, pl.cdiv(stacked, tile)
    stages = min(_MAX_STAGES, (SHARED_BYTES - tile * qk_dim * 2) // (KEYS * (qk_dim + v_dim) * 2))
    whole = row_tiles * tile

    def stack(x: jax.Array, multiple: int) -> jax.Array:
        """[..., rows, heads, n] to [..., kv_heads, stacked rows, n], their number rounded up."""
        x = jnp.swapaxes(x.reshape(*x.shape[:-2], kv_heads, group, x.shape[-1]), -4, -3)
        return _padded(x.reshape(*x.shape[:-3], stacked, x.shape[-1]), multiple)

    def flat(x: jax.Array) -> jax.Array:
        """[n, keys, kv_heads * dim]: no more axes than a TMA copy has."""
        return x.reshape(*x.shape[:2], -1)

    def kernel(
        q: Any, sink: Any, committed_k: Any, committed_v: Any, block_k: Any, block_v: Any, *others: Any,
        q_tile: Any, k_ring: Any, v_ring: Any, q_full: Any, k_full: Any, v_full: Any, empty: Any,
    ) -> None:  # fmt: skip
        (*scalars, out), log_sums = others[: len(scalar_arrays) + 1], others[len(scalar_arrays) + 1 :]
        sequence, kv_head = lax.axis_index("sequence"), lax.axis_index("kv_head")
        split, first = lax.axis_index("split"), lax.axis_index("row_tile") * tile
        warpgroup = lax.axis_index("warpgroup")
        first_row, end_row = lax.div(first, group), jnp.minimum(lax.div(first + tile - 1, group) + 1, rows)
        keys = tiles(*scalars, sequence, first_row, end_row)
        begin, end = (lax.div(keys.count * (split + n), splits) for n in range(2))

        @pl.when(warpgroup == warpgroups)
        def _fill() -> None:
            plgpu.copy_gmem_to_smem(q.at[sequence * kv_heads + kv_head, pl.ds(first, tile)], q_tile, q_full)

            def fill(i: jax.Array, _: None) -> None:
                stage = lax.rem(i - begin, stages)

                @pl.when(i - begin >= stages)
                def _wait() -> None:
                    plgpu.barrier_wait(empty.at[stage])
                    plgpu.commit_smem()  # what was read there may have been read by plain loads

                lie = keys.pieces(i)
                for ring, full, far, near, dim in (
                    (k_ring, k_full, committed_k, block_k, qk_dim),
                    (v_ring, v_full, committed_v, block_v, v_dim),
                ):
                    columns, offset = pl.ds(pl.multiple_of(kv_head * dim, dim), dim), 0
                    for size, piece in lie:
                        start, block_start = (
                            pl.ds(pl.multiple_of(n, ALIGNMENT), size) for n in (piece.start, piece.block_start)
                        )
                        into = ring.at[stage, pl.ds(offset, size)], full.at[stage]
                        old, new = far.at[piece.place, start, columns], near.at[sequence, block_start, columns]
                        pl.when(piece.committed)(partial(plgpu.copy_gmem_to_smem, old, *into))
                        pl.when(~piece.committed)(partial(plgpu.copy_gmem_to_smem, new, *into))
                        offset += size

            lax.fori_loop(begin, end, fill, None)
            for stage in range(stages):

                @pl.when(end - begin > stage)
                def _drain(stage: int = stage) -> None:
                    plgpu.barrier_wait(empty.at[stage])

        @pl.when(warpgroup < warpgroups)
        def _attend() -> None:
            mine = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            out_rows = pl.ds(pl.multiple_of(first + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
            shape = WARPGROUP_ROWS, KEYS

            def across(x: jax.Array, width: int) -> jax.Array:
                return lax.broadcast_in_dim(x, (WARPGROUP_ROWS, width), [0])

            stacked_row = first + warpgroup * WARPGROUP_ROWS + _iota(WARPGROUP_ROWS, _ROWS)
            row = across(lax.div(stacked_row, group), KEYS)
            plgpu.barrier_wait(q_full)

            def add_keys(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
                top, total, out = carry
                stage = lax.rem(i - begin, stages)
                at = lax.broadcast_in_dim(keys.positions(i, _iota(KEYS, _COLUMNS)), shape, [1])
                seen = at <= row if causal else at < rows
                if visible_keys is not None:
                    seen = seen & (row - at < visible_keys)
                plgpu.barrier_wait(k_full.at[stage])
                scores = _scores(q_tile.at[mine], k_ring.at[stage], interpret)
                scores = jnp.where(seen, scores * (qk_dim**-0.5 * math.log2(math.e)), _LOWEST)
                new_top = jnp.maximum(top, jnp.max(scores, axis=1))
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores - across(new_top, KEYS))
                total = total * shrink + jnp.sum(weights, axis=1)
                plgpu.barrier_wait(v_full.at[stage])
                out = _add_values(
                    out * across(shrink, v_dim), weights.astype(jnp.bfloat16), v_ring.at[stage], interpret
                )
                plgpu.barrier_arrive(empty.at[stage])
                return new_top, total, out

            # the sink is a logit like others, which one of the programs has met before its first key
            logit = plgpu.load(sink.at[kv_head, out_rows], layout=_ROWS, optimized=False) * math.log2(math.e)
            logit += jnp.where(split == 0, 0.0, -jnp.inf)
            top = jnp.maximum(logit, _LOWEST)
            total = jnp.exp2(logit - top)
            sums = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, v_dim), jnp.float32), plgpu.Layout.WGMMA)
            top, total, sums = lax.fori_loop(begin, end, add_keys, (top, total, sums))
            # nothing was met where a program has no keys
            share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
            out[split, sequence, kv_head, out_rows] = (sums * across(share, v_dim)).astype(out.dtype)
            for log_sum in log_sums:
                log_sum[split, sequence, kv_head, out_rows] = top + jnp.log2(total)

    scalar_arrays = [jnp.asarray(x, jnp.int32) for x in scalars]
    logits = jnp.full(heads, -jnp.inf, jnp.float32) if sink is None else sink.astype(jnp.float32)
    logits = stack(jnp.broadcast_to(logits[:, None], (rows, heads, 1)), tile)[..., 0]
    queries = stack(q, ALIGNMENT)
    queries = queries.reshape(-1, *queries.shape[2:])
    news = [x if rows < ALIGNMENT else _padded(x, ALIGNMENT) for x in map(flat, block)]
    found = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((splits, batch, kv_heads, whole, v_dim), jnp.float32 if splits > 1 else q.dtype),
            *[jax.ShapeDtypeStruct((splits, batch, kv_heads, whole), jnp.float32)] * (splits > 1),
        ],
        scratch_types={
            "q_tile": shared((tile, qk_dim), q.dtype, swizzle(qk_dim)),
            "k_ring": shared((stages, KEYS, qk_dim), q.dtype, swizzle(qk_dim)),
            "v_ring": shared((stages, KEYS, v_dim), q.dtype, swizzle(v_dim)),
            "q_full": plgpu.Barrier(),
            "k_full": plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
            "v_full": plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        },
        grid=(row_tiles, splits, kv_heads, batch),
        grid_names=("row_tile", "split", "kv_head", "sequence"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(queries, logits, *map(flat, committed), *news, *scalar_arrays)
    out = found[0][0] if splits == 1 else _merged(*found).astype(q.dtype)
    out = out[:, :, :stacked].reshape(batch, kv_heads, rows, group, v_dim)
    return jnp.swapaxes(out, 1, 2).reshape(batch, rows, heads, v_dim)


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """Add zeros to the second axis from the end."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % multiple), (0, 0)])


def _merged(parts: jax.Array, log_sums: jax.Array) -> jax.Array:
    """Results [splits, ..., v_dim] by the share that each part [splits, ...] has in the sum of exponentials of 2."""
    shares = jnp.exp2(log_sums - jnp.max(log_sums, axis=0))
    return jnp.sum(shares[..., None] * parts, axis=0) / jnp.sum(shares, axis=0)[..., None]


def programs(q: jax.Array, kv_heads: int) -> int:
    """Programs that `attend` starts for q [batch, rows, heads, qk_dim] if none share keys."""
    batch, rows, heads, _ = q.shape
    stacked = rows * heads // kv_heads
    return batch * kv_heads * pl.cdiv(stacked, _tile(stacked))


def _tile(stacked: int) -> int:
    """Rows that one program attends from: one warpgroup's, or two's."""
    return WARPGROUP_ROWS if stacked <= WARPGROUP_ROWS else 2 * WARPGROUP_ROWS


def swizzle(dim: int) -> int:
    """Bytes to which rows of a head are cut in shared memory: as many as the hardware's patterns and `dim` allow."""
    return math.gcd(dim * 2, 128)


def check_heads(queries: jax.Array, **others: jax.Array) -> None:
    """Raise NotImplementedError for arrays [..., heads, dim] that the kernel cannot multiply."""
    for what, x in (("queries", queries), *others.items()):
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(f"{what} must be bfloat16, not {x.dtype}")
        if x.shape[-1] % 16 or x.shape[-1] > 256:
            raise NotImplementedError(
                f"heads must have a multiple of 16 and up to 256 elements for wgmma; {what} have {x.shape[-1]}"
            )


def _iota(count: int, layout: Any) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)


def _scores(q: Any, k: Any, interpret: Any) -> jax.Array:
    """[rows, keys] float32 of references q [rows, qk_dim] and k [keys, qk_dim]."""
    if interpret:
        return lax.dot_general(q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, q, k.T)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((q.shape[0], k.shape[0])))


def _add_values(out: jax.Array, weights: jax.Array, v: Any, interpret: Any) -> jax.Array:
    """`out` [rows, v_dim] float32 plus weights [rows, keys] times the reference v [keys, v_dim]."""
    if interpret:
        return out + lax.dot_general(weights, v[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    def multiply(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, weights, v)

    sums: Any = pl.run_state(multiply)(plgpu.ACC.init(out))
    return sums
