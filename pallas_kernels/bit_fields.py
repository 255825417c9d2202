"""Codes inside packed words as bfloat16 numbers, by shifts and masks."""

import functools
import operator

import jax

Fields = tuple[tuple[int, int], ...]
"""How 16 bits of a word give a bfloat16: shifts left (or right, if negative) and masks, joined by or. Two halves of 32
bits are shifted together, so no mask may let through what crosses over."""


def fields_of(w: jax.Array, fields: Fields) -> jax.Array:
    """Some fields of unsigned words."""
    return functools.reduce(operator.or_, [(w << by if by >= 0 else w >> -by) & mask for by, mask in fields])
