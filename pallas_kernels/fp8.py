"""FP8 e4m3 weights with a float32 scale for every tile of rows and of 128 columns."""

import jax
import jax.numpy as jnp

COLUMNS = 128
"""Columns in a tile; the last tile may be cut short."""


def decode(values: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The weights in `dtype`. The product of value and scale is formed in float32 and rounded once.

    Args:
        values: [..., out, in] float8_e4m3fn.
        scales: [..., row tiles, column tiles] float32; tiles have equal numbers of rows.
        dtype: Of the result.
    """
    rows, columns = values.shape[-2:]
    tiles = jnp.repeat(jnp.repeat(scales, rows // scales.shape[-2], axis=-2), COLUMNS, axis=-1)
    return (values.astype(jnp.float32) * tiles[..., :columns]).astype(dtype)
