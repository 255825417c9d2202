"""MXFP4 experts in Triton, on weights as checkpoints store them: a check on other kernels, and for GPUs without one.

Two grouped matmuls of one kernel: with the pair of gate and up, whose results meet in SwiGLU, and with the pair of
down's halves. Compute capability 8.0 to 9.0 and 12.0 are served; for 10.0 the operands of large tiles exceed the tensor
memory, which jax-triton refuses when a program is lowered.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_rows import RaggedRows, ragged_rows

WORD = 8
"""Inputs of a 32-bit word of codes, and planes that rows are given in (`triton_paired_matmul`)."""
DEPTH = 128
"""Inputs of a step."""
MIN_TILE, MAX_TILE = 16, 64


class Tiling(NamedTuple):
    """How both matmuls are cut."""

    rows: int
    """Routed rows of a tile, a power of two."""
    width: int
    """Outputs of a program, of each of a pair."""
    warps: int
    stages: int


def mxfp4_expert_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up_codes: jax.Array,
    gate_up_scales: jax.Array,
    down_codes: jax.Array,
    down_scales: jax.Array,
    layer: jax.Array | int,
    *,
    routed: int | None,
    compute_capability: int | None = None,
) -> jax.Array:
    """See `pallas_kernels.mxfp4_expert_mlp`.

    Args:
        compute_capability: Of the GPU to compile for, such as 80 or 90; None: this machine's.
    """
    _, experts, _, inner, _ = gate_up_codes.shape
    hidden = down_codes.shape[2]
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"rows must be bfloat16, not {x.dtype}")
    if hidden % (2 * DEPTH) or inner % DEPTH:
        raise NotImplementedError(
            f"hidden {hidden} must be a multiple of {2 * DEPTH}, and inner {inner} of {DEPTH}: expert slices that are "
            "narrower cannot be read in whole blocks"
        )
    call, kernel = _triton()
    tiling = choose_tiling(ids.size, routed or experts)
    rows = ragged_rows(ids, experts, tiling.rows)
    run = partial(
        _paired_matmul, call, kernel, rows, jnp.asarray(layer, jnp.int32).reshape(1), tiling, compute_capability
    )
    planes = x.reshape(-1, hidden // WORD, WORD).swapaxes(1, 2).reshape(x.shape)
    activated = run(rows.gather(planes), gate_up_codes, gate_up_scales, outputs=inner, swiglu=True)
    return rows.combine(run(activated, down_codes, down_scales, outputs=hidden // 2, swiglu=False), weights)


def choose_tiling(pairs: int, routed: int) -> Tiling:
    """A tiling for `pairs` rows, spread evenly over `routed` experts."""
    rows = MIN_TILE
    while rows < MAX_TILE and rows * routed < pairs:
        rows *= 2
    return Tiling(rows, 64, 4, 4) if rows < 64 else Tiling(rows, 128, 8, 3)


def _triton() -> tuple[Callable[..., Any], Any]:
    try:
        from jax_triton import triton_call  # pyright: ignore[reportMissingImports]

        from pallas_kernels.triton_paired_matmul import paired_matmul
    except ImportError as error:
        raise NotImplementedError(f"Triton kernels need pip install 'mimo-jax[cuda,triton]': {error}") from error
    return triton_call, paired_matmul


def _paired_matmul(
    call: Callable[..., Any],
    kernel: Any,
    rows: RaggedRows,
    layer: jax.Array,
    tiling: Tiling,
    compute_capability: int | None,
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    outputs: int,
    swiglu: bool,
) -> jax.Array:
    """Rows x [rows, inputs] to [rows, outputs], or [rows, 2 * outputs] without SwiGLU; rows of no tile not written."""
    total, inputs = x.shape
    return call(
        *(x, codes, scales, layer, rows.tile_expert, rows.tile_first, rows.tile_rows, rows.count),
        kernel=kernel,
        out_shape=jax.ShapeDtypeStruct((total, outputs if swiglu else 2 * outputs), jnp.bfloat16),
        grid=(outputs // tiling.width, rows.tile_expert.size),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        compute_capability=compute_capability,
        experts=codes.shape[1],
        inputs=inputs,
        outputs=outputs,
        swiglu=swiglu,
        rows=tiling.rows,
        width=tiling.width,
        depth=DEPTH,
    )
