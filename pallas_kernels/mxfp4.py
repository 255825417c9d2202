"""The MXFP4 codec: OCP Microscaling e2m1 codes in blocks of 32 with one e8m0 scale (OCP MX v1.0, section 5.3).

Codes are packed two to a byte along the last axis, the even element in the low nibble. A code is
sign << 3 | magnitude index; a scale byte u stands for 2**(u - 127), and 255 is NaN, which no weight has.
"""

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 32
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])


def scale_values(scales: jax.Array) -> jax.Array:
    """2**(u - 127) in float32 from scale bytes [...] uint8, exactly; byte 255 gives NaN.

    Built from the exponent bits: `exp2` is not exact on every backend. Bytes 0 and below the normal range are
    denormal (byte 0 only) and flushed to zero by XLA on most devices.
    """
    u = scales.astype(jnp.uint32)
    bits = jnp.where(u == 0, jnp.uint32(1 << 22), jnp.where(u == 255, jnp.uint32(0x7FC00000), u << 23))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def decode(codes: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Decode packed weights.

    Args:
        codes: [..., n / 2] uint8.
        scales: [..., n / 32] uint8.
        dtype: float32 or bfloat16; both hold every value exactly for scale bytes 2 to 252.

    Returns:
        [..., n] in `dtype`.
    """
    nibbles = jnp.stack([codes & 0xF, codes >> 4], axis=-1)  # [..., n / 2, 2]
    blocked = nibbles.reshape(*scales.shape, BLOCK)
    values = jnp.asarray(_VALUES, dtype)[blocked] * scale_values(scales)[..., None].astype(dtype)
    return values.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def encode(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encode by the OCP rule: exponent floor(log2(amax)) - 2, elements rounded to nearest even, saturated at 6.

    Args:
        values: [..., n], n a multiple of 32; computed in float32.

    Returns:
        codes [..., n / 2] uint8 and scales [..., n / 32] uint8.

    Raises:
        ValueError: n is not a multiple of 32.
    """
    *lead, n = values.shape
    if n % BLOCK:
        raise ValueError(f"MXFP4 blocks hold {BLOCK} values: the last axis must be a multiple of it, not {n}")
    blocks = values.astype(jnp.float32).reshape(*lead, n // BLOCK, BLOCK)
    amax_bits = jnp.max(jax.lax.bitcast_convert_type(blocks, jnp.uint32) & 0x7FFFFFFF, axis=-1)
    # the scale byte is amax's biased exponent, floor(log2(amax)) + 127, minus 2; tiny and zero blocks clip
    scales = jnp.clip((amax_bits >> 23).astype(jnp.int32) - 2, 0, 254)
    # Scaling by the inverse in two steps keeps every factor a normal number.
    half = (127 - scales) // 2
    scaled = blocks * _power_of_two(half)[..., None] * _power_of_two(127 - scales - half)[..., None]
    magnitude = jnp.minimum(jnp.abs(scaled), 6)
    below_2, below_4 = magnitude < 2, magnitude < 4
    steps = jnp.where(below_2, 2.0, jnp.where(below_4, 1.0, 0.5))  # to the unit: codes lie 0.5, 1 and 2 apart
    first = jnp.where(below_2, 0.0, jnp.where(below_4, 2.0, 4.0))  # code of magnitude 0, if the line went on down
    index = (jnp.round(magnitude * steps) + first).astype(jnp.uint8)  # jnp.round rounds halves to even
    nibbles = (index | (jnp.signbit(blocks).astype(jnp.uint8) << 3)).reshape(*lead, n // 2, 2)
    return nibbles[..., 0] | (nibbles[..., 1] << 4), scales.astype(jnp.uint8)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2**exponent in float32 for int32 exponents in the normal range."""
    return jax.lax.bitcast_convert_type(((exponent + 127).astype(jnp.uint32)) << 23, jnp.float32)
