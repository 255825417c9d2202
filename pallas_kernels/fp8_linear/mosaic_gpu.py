"""The FP8 linear layer on Hopper, for few rows, in Pallas Mosaic GPU: weights are read as they are, once.

Expanding a weight first, as XLA does, moves five times its bytes. Here a warpgroup has 64 outputs and a part of the
inputs, asks for all of them at once, and multiplies as they come; several of these share a multiprocessor. Parts are
summed afterwards. Weights are wgmma's first operand, from registers; every 128 inputs their sum is scaled in float32.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bit_fields import Fields
from pallas_kernels.fp8 import COLUMNS
from pallas_kernels.hopper import MULTIPROCESSORS, SHARED_BYTES, WARPGROUP_ROWS, shared
from pallas_kernels.mosaic_decode import decode_registers

MOST_ROWS = 64
"""Beyond it, expanding a weight costs little beside multiplying with it."""
PROGRAMS = 2 * MULTIPROCESSORS
"""Parts to cut a weight into, if it has as many."""

EVEN: Fields = ((8, 0x8000), (4, 0x07F0))
ODD: Fields = ((0, 0x8000), (-4, 0x07F0))
"""Of two e4m3 values in 16 bits, each as a bfloat16 of value * 2**-120."""


def fp8_linear(
    x: jax.Array, values: jax.Array, scales: jax.Array, layer: jax.Array | int, *, interpret: Any = False
) -> jax.Array:
    """See `pallas_kernels.fp8_linear`; `interpret` as in `interleaved_expert_mlp`."""
    *lead, inputs = x.shape
    rows, outputs = math.prod(lead), values.shape[1]
    tile = outputs // scales.shape[1]
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"rows must be bfloat16, not {x.dtype}")
    if inputs % COLUMNS or tile % WARPGROUP_ROWS:
        raise NotImplementedError(
            f"inputs must be a multiple of {COLUMNS} and rows of a scale of {WARPGROUP_ROWS}, not {inputs} and {tile}"
        )
    if rows > MOST_ROWS:
        raise NotImplementedError(f"{rows} rows are more than {MOST_ROWS}: expanding the weight is as fast")
    flat = jnp.pad(x.reshape(rows, inputs), ((0, -rows % 8), (0, 0)))
    # even inputs of every 128 before odd ones, as `EVEN` and `ODD` take them apart
    halves = flat.reshape(-1, inputs // COLUMNS, COLUMNS // 2, 2).swapaxes(2, 3).reshape(flat.shape)
    at = jnp.asarray(layer, jnp.int32).reshape(1)
    parts = _multiply(halves, values, scales, at, interpret=interpret)
    return jnp.sum(parts, axis=0).T[:rows].astype(x.dtype).reshape(*lead, outputs)


def choose_parts(rows: int, inputs: int, outputs: int) -> int:
    """Into how many equal parts of whole blocks the inputs are cut."""
    blocks = inputs // COLUMNS
    fitting = (SHARED_BYTES - 4 * WARPGROUP_ROWS * rows) // (COLUMNS * (WARPGROUP_ROWS + 2 * rows))
    divisors = [n for n in range(1, blocks + 1) if not blocks % n and blocks // n <= fitting]
    return next((n for n in divisors if n * (outputs // WARPGROUP_ROWS) >= PROGRAMS), blocks)


@partial(jax.jit, static_argnames="interpret")  # layers share what it lowers to
def _multiply(x: jax.Array, values: jax.Array, scales: jax.Array, layer: jax.Array, *, interpret: Any) -> jax.Array:
    """Parts [parts, out, rows] float32 of x [rows, in], rows a multiple of 8, with even inputs before odd ones."""
    (rows, inputs), outputs = x.shape, values.shape[1]
    tile = outputs // scales.shape[1]
    parts = choose_parts(rows, inputs, outputs)
    steps = inputs // COLUMNS // parts

    def kernel(
        x: Any, values: Any, scales: Any, layer: Any, out: Any, x_at: Any, w_at: Any, sums: Any, full: Any
    ) -> None:
        part, block = lax.axis_index("part"), lax.axis_index("block")
        first = part * steps

        def fetch(step: jax.Array, _: None) -> None:
            columns = pl.ds((first + step) * COLUMNS, COLUMNS)
            plgpu.copy_gmem_to_smem(
                values.at[layer[0], pl.ds(block * WARPGROUP_ROWS, WARPGROUP_ROWS), columns],
                w_at.at[step],
                full.at[step],
            )
            plgpu.copy_gmem_to_smem(x.at[:, columns], x_at.at[step], full.at[step])

        lax.fori_loop(0, steps, fetch, None)
        scale_row = lax.div(block * WARPGROUP_ROWS, tile)

        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            plgpu.barrier_wait(full.at[step])
            if interpret:
                product = _portable_product(w_at[step], x_at[step])
            else:
                packed = plgpu.load(w_at.at[step], layout=plgpu.Layout.WGMMA_8BIT)
                halves = decode_registers(packed, (EVEN, ODD), plgpu.Layout.WGMMA_8BIT)

                def multiply(product: Any) -> jax.Array:
                    for half, codes in enumerate(halves):
                        operand = codes * jnp.bfloat16(2.0**120)
                        columns = pl.ds(half * (COLUMNS // 2), COLUMNS // 2)
                        plgpu.wgmma(product, operand, x_at.at[step, :, columns].T)
                    return product[...]

                product = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, rows)))
            return total + product * scales[layer[0], scale_row, first + step]

        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, rows), jnp.float32), plgpu.Layout.WGMMA)
        sums[...] = lax.fori_loop(0, steps, add, zeros)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums, out.at[part, pl.ds(block * WARPGROUP_ROWS, WARPGROUP_ROWS)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, outputs, rows), jnp.float32),
        scratch_types={
            "x_at": shared((steps, rows, COLUMNS), jnp.bfloat16, 128),
            "w_at": shared((steps, WARPGROUP_ROWS, COLUMNS), jnp.float8_e4m3fn, 128),
            "sums": plgpu.SMEM((WARPGROUP_ROWS, rows), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=steps),
        },
        grid=(parts, outputs // WARPGROUP_ROWS),
        grid_names=("part", "block"),
        kernel_name="fp8_linear",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(x, values, scales, layer)


def _portable_product(w: jax.Array, x: jax.Array) -> jax.Array:
    """Values [outputs, 128] times x [rows, 128] with even inputs before odd ones, in arithmetic."""
    plain = w.astype(jnp.float32)
    ordered = jnp.concatenate([plain[:, ::2], plain[:, 1::2]], axis=1)
    return lax.dot_general(ordered, x.astype(jnp.float32), (((1,), (1,)), ((), ())))
