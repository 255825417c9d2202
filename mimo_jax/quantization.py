"""Weights as they are held: MXFP4 codes with e8m0 scales, FP8 e4m3 with float32 block scales, and plain ones.

A weight leaf is a plain array [..., out, in] or one of the types here; `dequantize` makes any of them plain.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import fp8, interleaved_mxfp4, mxfp4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MXFP4Weight:
    """A weight [..., out, in] in MXFP4: blocks of 32 along `in` share a power-of-two scale."""

    codes: jax.Array
    """[..., out, in / 2] uint8, the even element in the low nibble."""
    scales: jax.Array
    """[..., out, in / 32] uint8, 2**(byte - 127)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InterleavedWeight:
    """A weight [..., out, in] in MXFP4, ordered for a kernel (see `pallas_kernels.interleaved_mxfp4`)."""

    words: jax.Array
    """[..., out, in / 4] int16."""
    scales: jax.Array
    """[..., in / 128, 4, out] uint8."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FP8BlockWeight:
    """A weight [..., out, in] in FP8 e4m3 with multiplicative scales: one for each tile of rows and of columns.

    Rows of a fused projection are reordered at load, so a tile has as many rows as the reordering left together
    (`out / scales.shape[-2]`: 128 for a plain weight, 64 for the K and V of a 192/128 head).
    """

    values: jax.Array
    """[..., out, in] float8_e4m3fn."""
    scales: jax.Array
    """[..., row tiles, column tiles] float32."""


@dataclass(frozen=True)
class FP8Layer:
    """One layer of a stack of FP8 weights, which a kernel reads where it lies."""

    stack: FP8BlockWeight
    layer: jax.Array | int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Swapped:
    """A plain weight [..., out, in] that lies in memory with its inputs first."""

    values: jax.Array
    """[..., in, out]."""


Weight = jax.Array | MXFP4Weight | InterleavedWeight | FP8BlockWeight | FP8Layer | Swapped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByLayer:
    """A stack of weights held layer by layer, which plain integers number."""

    layers: tuple[Weight, ...]


def dequantize(weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A weight of any type as a plain array [..., out, in] in `dtype`."""
    match weight:
        case MXFP4Weight(codes, scales):
            return mxfp4.decode(codes, scales, dtype)
        case InterleavedWeight(words, scales):
            return interleaved_mxfp4.decode(words, scales, dtype)
        case FP8BlockWeight(values, scales):
            return fp8.decode(values, scales, dtype)
        case FP8Layer(stack, layer):
            return fp8.decode(stack.values[layer], stack.scales[layer], dtype)
        case Swapped(values):
            return jnp.swapaxes(values, -1, -2).astype(dtype)
        case _:
            return weight.astype(dtype)


def inputs_first(weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The same as an array [..., in, out]."""
    if isinstance(weight, Swapped):
        return weight.values.astype(dtype)
    return jnp.swapaxes(dequantize(weight, dtype), -1, -2)


def encode_fp8(values: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Encode a weight on the host. Scales are the least powers of two that keep a tile within 448, e4m3's largest.

    A floating-point format gains nothing from finer scales, and with these a weight that was rounded to four
    significant bits in training is stored as it is (down to 2**-14 of its tile's largest, where e4m3 runs out).

    Args:
        values: [out, in]; computed in float32.
        block: Rows and columns of a tile; the last ones may be cut short.

    Returns:
        values [out, in] float8_e4m3fn, rounded to nearest even, and the float32 scales [row tiles, column tiles] that
        multiply them. The scale of a tile that holds a number that is not finite is not finite.
    """
    (rows, columns), (tile_rows, tile_columns) = values.shape, block
    tiles = (math.ceil(rows / tile_rows), math.ceil(columns / tile_columns))
    padded = np.zeros((tiles[0] * tile_rows, tiles[1] * tile_columns), np.float32)
    padded[:rows, :columns] = values
    padded = padded.reshape(tiles[0], tile_rows, tiles[1], tile_columns)
    amax = np.abs(padded).max(axis=(1, 3))
    # a tile of zeros, or of numbers too small for this, gets the smallest scale that no device flushes to zero
    mantissa, exponent = np.frexp(np.maximum(amax / np.float32(448), np.finfo(np.float32).tiny))
    scales = np.where(np.isfinite(amax), np.ldexp(np.float32(1), exponent - (mantissa == 0.5)), amax)
    with np.errstate(invalid="ignore"):
        padded /= scales[:, None, :, None]
        encoded = padded.astype(ml_dtypes.float8_e4m3fn)
    return encoded.reshape(tiles[0] * tile_rows, tiles[1] * tile_columns)[:rows, :columns], scales
