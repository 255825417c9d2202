"""MXFP4 as the Hopper kernel reads it: as many bytes as `mxfp4`, ordered so that four instructions decode a register.

Along the inputs, 128 codes become 32 words of 16 bits: word c holds the codes of inputs c, 32 + c, 64 + c and 96 + c,
which stand in four blocks of 32 and so under four scales. A word's bits lie so that the first three codes are bfloat16
numbers after a shift by 0, 3 and 6 and one mask, and the fourth after three shifts and masks: the value times 2**-126,
with which e2m1's only subnormal is bfloat16's too. (Shifts and mask after triton_kernels' Hopper layout.)

Scales are held outputs last, [..., in / 128, 4, out], and a byte u stands for 2**(u - 32): 2**126 undoes the codes'
factor and 2**-31 keeps scales that are larger than 2 within bfloat16. A product with the decoded weights is therefore
2**31 times too small (`PRODUCT_SCALE`).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.bit_fields import Fields, fields_of
from pallas_kernels.mxfp4 import BLOCK, MAGNITUDES, scale_values

WIDTH = 128
"""Inputs that are interleaved together."""
CODES = WIDTH // BLOCK
"""Codes in a word."""
PRODUCT_SCALE = 2.0**31
_BITS = 0x81C0  # sign, the last two bits of the exponent and the first of the mantissa of a bfloat16
FIELDS: tuple[Fields, ...] = (((0, _BITS),), ((3, _BITS),), ((6, _BITS),), ((1, 0x8000), (-5, 0x0100), (-4, 0x00C0)))
"""Of each code, as a bfloat16 of value * 2**-126."""
_SCALE_SHIFT = 95


def interleave(codes: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reorder packed weights; `deinterleave` undoes it.

    Args:
        codes: [..., out, in / 2] uint8 as `mxfp4` has them; `in` a multiple of 128.
        scales: [..., out, in / 32] uint8.

    Returns:
        words [..., out, in / 4] int16 and scales [..., in / 128, 4, out] uint8. Scale bytes above 159, which stand for
        2**33 and more, become infinite.

    Raises:
        ValueError: `in` is not a multiple of 128.
    """
    *lead, out, half = codes.shape
    if 2 * half % WIDTH:
        raise ValueError(f"{WIDTH} inputs are interleaved together: their number must be a multiple, not {2 * half}")
    nibbles = jnp.stack([codes & 0xF, codes >> 4], axis=-1)
    a, b, c, d = jnp.moveaxis(nibbles.reshape(*lead, out, -1, CODES, BLOCK), -2, 0).astype(jnp.uint16)
    words = _first_three(a) | _first_three(b) >> 3 | _first_three(c) >> 6
    words |= (d & 8) << 11 | (d & 4) << 11 | (d & 3) << 10
    shifted = jnp.minimum(scales.astype(jnp.uint16) + _SCALE_SHIFT, 255).astype(jnp.uint8)
    blocks = jnp.moveaxis(shifted.reshape(*lead, out, -1, CODES), -3, -1)
    return jax.lax.bitcast_convert_type(words.reshape(*lead, out, half // 2), jnp.int16), blocks


def deinterleave(words: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes and scales as `interleave` takes them; scale bytes above 159 come back as 160."""
    nibbles = jnp.stack([bits >> 12 & 8 | bits >> 6 & 7 for bits in bfloat16_bits(words)], axis=-2)
    codes = nibbles.reshape(*words.shape[:-1], -1, 2).astype(jnp.uint8)
    blocks = jnp.moveaxis(scales, -1, -3)
    return codes[..., 0] | codes[..., 1] << 4, blocks.reshape(*blocks.shape[:-2], -1) - jnp.uint8(_SCALE_SHIFT)


def decode(words: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The weights [..., out, in] in `dtype`, as `mxfp4.decode` gives them.

    Args:
        words: [..., out, in / 4] int16.
        scales: [..., in / 128, 4, out] uint8.
        dtype: float32 or bfloat16.
    """
    bits = jnp.stack(bfloat16_bits(words), axis=-2)  # [..., out, in / 128, 4, 32]
    magnitudes = jnp.asarray(MAGNITUDES, dtype)[bits >> 6 & 7]
    values = jnp.where(bits >> 15 == 1, -magnitudes, magnitudes)
    # 2**(u - 95 - 127): subtracting 95 first keeps the table of all 256 bytes
    powers = scale_values(jnp.moveaxis(scales, -1, -3) - jnp.uint8(_SCALE_SHIFT)).astype(dtype)
    return (values * powers[..., None]).reshape(*words.shape[:-1], -1)


def bfloat16_bits(words: jax.Array) -> list[jax.Array]:
    """The four codes of every word as bfloat16 patterns [..., in / 128, 32] uint16 of value * 2**-126."""
    w = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*words.shape[:-1], -1, BLOCK)
    return [fields_of(w, fields) for fields in FIELDS]


def _first_three(code: jax.Array) -> jax.Array:
    return (code & 8) << 12 | (code & 7) << 6
