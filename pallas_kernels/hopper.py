"""What the Mosaic GPU kernels share: facts of the GPU they are written for."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP_ROWS = 64
"""Rows of wgmma's first operand."""
MULTIPROCESSORS = 132
"""Of an H100 and an H200."""
SHARED_BYTES = 225 * 1024
"""Shared memory that a program may fill, beside its barriers."""


def shared(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, swizzle: int) -> Any:
    """Shared memory as wgmma and TMA both address it; rows are cut into pieces of `swizzle` bytes."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))  # pyright: ignore[reportAbstractUsage]
