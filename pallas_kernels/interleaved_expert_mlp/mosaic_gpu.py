"""Interleaved experts on Hopper, in Pallas Mosaic GPU: two grouped matmuls that read weights as they are packed.

Both matmuls are one kernel, which multiplies a tile of routed rows with a pair of weight tiles: gate and up, whose
results meet in SwiGLU, or two halves of down. Weights are decoded in registers, where they are wgmma's first operand;
rows are its second, so that a tile may have as few as eight. A grid of one program a multiprocessor walks the tiles
that there are; one warpgroup keeps a ring of stages filled by TMA, across tiles, and the others multiply.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bit_fields import fields_of
from pallas_kernels.hopper import MULTIPROCESSORS, SHARED_BYTES, WARPGROUP_ROWS, shared
from pallas_kernels.interleaved_mxfp4 import CODES, FIELDS, PRODUCT_SCALE, WIDTH
from pallas_kernels.mosaic_decode import decode_registers
from pallas_kernels.mxfp4 import BLOCK
from pallas_kernels.ragged_rows import ROW_ALIGNMENT, ragged_rows

MAX_TILE = 128


class Tiling(NamedTuple):
    """How a matmul is cut."""

    rows: int
    """Routed rows of a tile, a multiple of 8."""
    warpgroups: int
    """That multiply, 64 outputs each of both tiles of a pair."""
    blocks: int
    """Blocks of 128 inputs in a stage."""
    stages: int


def interleaved_expert_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up_words: jax.Array,
    gate_up_scales: jax.Array,
    down_words: jax.Array,
    down_scales: jax.Array,
    layer: jax.Array | int,
    *,
    routed: int | None,
    tilings: tuple[Tiling, Tiling] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `pallas_kernels.interleaved_expert_mlp`.

    Args:
        tilings: Of the two matmuls, with as many rows; None: chosen by shape.
        interpret: `plgpu.InterpretGPUParams` to run on a CPU. The interpreter knows neither inline instructions nor
            wgmma with an operand in registers: these are replaced by arithmetic, all else is the kernel.
    """
    _, experts, _, inner, _ = gate_up_words.shape
    hidden = down_words.shape[2]
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"rows must be bfloat16, not {x.dtype}")
    if hidden % (2 * WIDTH) or inner % WIDTH:
        raise NotImplementedError(
            f"hidden {hidden} must be a multiple of {2 * WIDTH}, and inner {inner} of {WIDTH}: expert slices that are "
            "narrower cannot be read in whole tiles"
        )
    first, second = tilings or choose_tilings(ids.size, experts, routed or experts, hidden, inner)
    rows = ragged_rows(ids, experts, first.rows)
    tiles = rows.tile_expert, rows.tile_first, rows.tile_rows, rows.count
    at = jnp.asarray(layer, jnp.int32).reshape(1)
    run = partial(paired_matmul, layer=at, tiles=tiles, interpret=interpret)

    gate_up = _flat(gate_up_words, inner), gate_up_scales.reshape(-1, hidden // WIDTH, CODES, inner)
    halves = _flat(down_words, hidden // 2), down_scales.reshape(-1, inner // WIDTH, CODES, hidden)
    activated = run(rows.gather(x), *gate_up, experts=experts, swiglu=True, tiling=first)
    return rows.combine(run(activated, *halves, experts=experts, swiglu=False, tiling=second), weights)


def choose_tilings(pairs: int, experts: int, routed: int, hidden: int, inner: int) -> tuple[Tiling, Tiling]:
    """Tilings for the two matmuls of `pairs` rows, spread evenly over `routed` experts of which `experts` are here.

    Two warpgroups multiply, but one where tiles of two would leave half of the multiprocessors idle.
    """
    rows = ROW_ALIGNMENT
    while rows < MAX_TILE and rows * routed < pairs:
        rows *= 2
    used = min(experts, math.ceil(pairs * experts / routed))  # experts that have rows, at most

    def tiling(outputs: int, inputs: int) -> Tiling:
        warpgroups = 2 if used * outputs // (4 * WARPGROUP_ROWS) > MULTIPROCESSORS // 2 else 1
        blocks = 2 if rows < MAX_TILE // 2 and inputs % (2 * WIDTH) == 0 else 1  # as many operands as registers hold
        return Tiling(rows, warpgroups, blocks, _stages(rows, warpgroups, blocks))

    return tiling(2 * inner, hidden), tiling(hidden, inner)


def _stages(rows: int, warpgroups: int, blocks: int) -> int:
    """As many stages as shared memory holds beside the results; more than six gain nothing."""
    outputs = 2 * warpgroups * WARPGROUP_ROWS
    stage = blocks * WIDTH * (outputs // 2 + rows * 2) + blocks * CODES * outputs
    return min(6, (SHARED_BYTES - rows * outputs * 2) // stage)


def _flat(words: jax.Array, outputs: int) -> jax.Array:
    """[layers * experts * 2, outputs, inputs / 4]: no more axes than a TMA copy has."""
    return words.reshape(-1, outputs, words.shape[-1])


@partial(jax.jit, static_argnames=("experts", "swiglu", "tiling", "interpret"))  # layers share what it lowers to
def paired_matmul(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    *,
    layer: jax.Array,
    tiles: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    experts: int,
    swiglu: bool,
    tiling: Tiling,
    interpret: Any,
) -> jax.Array:
    """Multiply tiles of rows with their experts' pairs of weights.

    Args:
        x: [rows, inputs] bfloat16.
        words: [layers * experts * 2, outputs, inputs / 4] int16.
        scales: With SwiGLU [layers * experts * 2, inputs / 128, 4, outputs] uint8, otherwise both halves' outputs in
            one row: [layers * experts, inputs / 128, 4, 2 * outputs].
        layer: [1] int32.
        tiles: Expert, first row and rows of every tile, and their number (`RaggedRows`).
        experts: Of a layer.
        swiglu: Whether the result is silu(first) * second, or both side by side.
        tiling: How.
        interpret: See above.

    Returns:
        [rows, outputs] or [rows, 2 * outputs] bfloat16. Rows of no tile are not written.
    """
    (rows, inputs), outputs = x.shape, words.shape[1]
    wide, width = tiling.warpgroups * WARPGROUP_ROWS, tiling.blocks * WIDTH
    across, steps = outputs // wide, inputs // width
    programs = 2 if interpret else MULTIPROCESSORS
    decode = _portable_values if interpret else partial(decode_registers, codes=FIELDS, layout=plgpu.Layout.WGMMA)
    assert not outputs % wide, (outputs, tiling)
    assert not inputs % width, (inputs, tiling)

    def kernel(
        x: Any, words: Any, scales: Any, layer: Any, tile_expert: Any, tile_first: Any, tile_rows: Any, count: Any,
        out: Any, x_ring: Any, words_ring: Any, scales_ring: Any, results: Any, full: Any, empty: Any,
    ) -> None:  # fmt: skip
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        tasks = lax.div(count[0] * across - program + programs - 1, programs)

        def task(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            number = program + i * programs
            tile = lax.div(number, across)
            first = pl.multiple_of(tile_first[tile], ROW_ALIGNMENT)
            column = pl.multiple_of(lax.rem(number, across) * wide, wide)
            return layer[0] * experts + tile_expert[tile], first, tile_rows[tile], column

        @pl.when(warpgroup == tiling.warpgroups)
        def _fill() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def fill_stages(i: jax.Array, done: jax.Array) -> jax.Array:
                expert, first, _, column = task(i)

                def fill(step: jax.Array, done: jax.Array) -> jax.Array:
                    stage = lax.rem(done, tiling.stages)

                    @pl.when(done >= tiling.stages)
                    def _wait() -> None:
                        plgpu.barrier_wait(empty.at[stage])
                        plgpu.commit_smem()  # what was read there by plain loads is overwritten by a copy

                    k = step * tiling.blocks
                    for half in range(2):
                        plgpu.copy_gmem_to_smem(
                            words.at[expert * 2 + half, pl.ds(column, wide), pl.ds(k * BLOCK, width // CODES)],
                            words_ring.at[stage, half],
                            full.at[stage],
                        )
                        at = expert * 2 + half if swiglu else expert
                        plgpu.copy_gmem_to_smem(
                            scales.at[
                                at, pl.ds(k, tiling.blocks), :, pl.ds(column + (not swiglu) * half * outputs, wide)
                            ],
                            scales_ring.at[stage, half],
                            full.at[stage],
                        )
                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(first, tiling.rows), pl.ds(k * WIDTH, width)], x_ring.at[stage], full.at[stage]
                    )
                    return done + 1

                return lax.fori_loop(0, steps, fill, done)

            done = lax.fori_loop(0, tasks, fill_stages, jnp.int32(0))
            for stage in range(tiling.stages):

                @pl.when(done > stage)
                def _drain(stage: int = stage) -> None:
                    plgpu.barrier_wait(empty.at[stage])

        @pl.when(warpgroup < tiling.warpgroups)
        def _multiply() -> None:
            # what the filling warpgroup gave up; together they may not exceed what the program was started with
            plgpu.set_max_registers(232 if tiling.warpgroups == 1 else 216, action="increase")
            mine = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def multiply_tile(i: jax.Array, done: jax.Array) -> jax.Array:
                _, first, valid, column = task(i)

                def step(_: jax.Array, carry: Any, add: Callable[[Any, int, jax.Array, Any], Any]) -> Any:
                    done, sums = carry
                    stage = lax.rem(done, tiling.stages)
                    plgpu.barrier_wait(full.at[stage])
                    for block in range(tiling.blocks):
                        for half in range(2):
                            packed = plgpu.load(
                                words_ring.at[stage, half, mine, pl.ds(block * BLOCK, BLOCK)],
                                layout=plgpu.Layout.WGMMA,
                            )
                            for slot, values in enumerate(decode(packed)):
                                scale = plgpu.load(
                                    scales_ring.at[stage, half, block, slot, mine], layout=plgpu.Layout.WGMMA.reduce(1)
                                )
                                power = lax.bitcast_convert_type(scale.astype(jnp.int16) << 7, jnp.bfloat16)
                                scaled = values * lax.broadcast_in_dim(power, values.shape, [0])
                                columns = pl.ds(block * WIDTH + slot * BLOCK, BLOCK)
                                sums = add(sums, half, scaled, x_ring.at[stage, :, columns])
                    if not interpret:
                        plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[stage])
                    return done + 1, sums

                if interpret:

                    def add(sums: Any, half: int, values: jax.Array, rows: Any) -> Any:
                        product = lax.dot_general(
                            values, rows[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
                        )
                        return tuple(s + product if h == half else s for h, s in enumerate(sums))

                    zeros = jnp.zeros((WARPGROUP_ROWS, tiling.rows), jnp.float32)
                    done, sums = lax.fori_loop(0, steps, partial(step, add=add), (done, (zeros, zeros)))
                else:

                    def multiply(a: Any, b: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                        def add(sums: Any, half: int, values: jax.Array, rows: Any) -> Any:
                            plgpu.wgmma((a, b)[half], values, rows.T)
                            if tiling.rows > MAX_TILE // 2:
                                # the sums leave no registers for more operands; the other warpgroup keeps the tensor
                                # cores busy
                                plgpu.wgmma_wait(0)
                            return sums

                        finished, _ = lax.fori_loop(0, steps, partial(step, add=add), (done, ()))
                        return finished, (a[...], b[...])

                    shape = WARPGROUP_ROWS, tiling.rows
                    done, sums = pl.run_scoped(multiply, plgpu.ACC(shape), plgpu.ACC(shape))

                # the interpreter's values lack the factor that the codes have as bits
                a, b = (s * (PRODUCT_SCALE * 2.0**-126 if interpret else PRODUCT_SCALE) for s in sums)
                finished = (a / (1 + jnp.exp(-a)) * b,) if swiglu else (a, b)
                for half, values in enumerate(finished):
                    into = results.at[warpgroup, half]
                    if interpret:
                        into[...] = values.astype(jnp.bfloat16).T
                    else:
                        into.T[...] = plgpu.layout_cast(values.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                for row in range(0, tiling.rows, ROW_ALIGNMENT):

                    @pl.when(row < valid)
                    def _store(row: int = row) -> None:
                        for half in range(len(finished)):
                            at = pl.ds(half * outputs + column + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
                            plgpu.copy_smem_to_gmem(
                                results.at[warpgroup, half, pl.ds(row, ROW_ALIGNMENT)],
                                out.at[pl.ds(first + row, ROW_ALIGNMENT), at],
                            )

                plgpu.wait_smem_to_gmem(0)
                return done

            lax.fori_loop(0, tasks, multiply_tile, jnp.int32(0))

    halves = 1 if swiglu else 2
    stages = tiling.stages
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, halves * outputs), jnp.bfloat16),
        scratch_types={
            "x_ring": shared((stages, tiling.rows, width), jnp.bfloat16, 64),
            "words_ring": shared((stages, 2, wide, width // CODES), jnp.int16, 64),
            "scales_ring": plgpu.SMEM((stages, 2, tiling.blocks, CODES, wide), jnp.uint8),
            "results": shared((tiling.warpgroups, halves, tiling.rows, WARPGROUP_ROWS), jnp.bfloat16, 128),
            "full": plgpu.Barrier(num_arrivals=5, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=stages),
        },
        grid=(programs,),
        grid_names=("program",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="mxfp4_gate_up" if swiglu else "mxfp4_down",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(x, words, scales, layer, *tiles)


def _portable_values(words: jax.Array) -> tuple[jax.Array, ...]:
    """The codes' values themselves, in arithmetic: on a CPU, XLA flushes what is as small as value * 2**-126."""

    def value(bits: jax.Array) -> jax.Array:
        exponent, mantissa = bits >> 7 & 3, bits >> 6 & 1
        doubled = jnp.where(exponent > 0, 2 + mantissa << jnp.maximum(exponent - 1, 0), mantissa)
        return (doubled.astype(jnp.float32) * jnp.where(bits & 0x8000 != 0, -0.5, 0.5)).astype(jnp.bfloat16)

    w = words.astype(jnp.int32) & 0xFFFF
    return tuple(value(fields_of(w, fields)) for fields in FIELDS)
