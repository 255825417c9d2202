"""Packed weights as wgmma's first operand: decoded in registers, 32 bits at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.bit_fields import Fields


def decode_registers(words: jax.Array, codes: tuple[Fields, ...], layout: plgpu.Layout) -> tuple[jax.Array, ...]:
    """Inside a kernel: every code's values [rows, bits / 16] bfloat16 of packed words [rows, ...] in wgmma's layout.

    Written in instructions: the compiler takes 16-bit operations apart, one half at a time.

    Args:
        words: int16 in `Layout.WGMMA`, or uint8 in `Layout.WGMMA_8BIT`; either way a register has 32 bits.
        codes: The fields of each code.
        layout: Which.
    """
    rows, columns = words.shape
    shape = rows, columns * words.dtype.itemsize // 2
    one = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=(one,) * len(codes))
    def decode(_: Any, packed: Any) -> tuple[Any, ...]:
        word, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        into = plgpu.Layout.WGMMA.to_mgpu()

        def field(w: Any, by: int, mask: int) -> Any:
            both = mask << 16 | mask
            shifted = (arith.shli if by >= 0 else arith.shrui)(w, arith.constant(word, abs(by)))
            return arith.andi(shifted, arith.constant(word, ir.IntegerAttr.get(word, both - (both >> 31 << 32))))

        found = [np.empty_like(packed.registers) for _ in codes]
        for index, register in np.ndenumerate(packed.registers):
            w = utils.bitcast(register, word)
            for values, fields in zip(found, codes, strict=True):
                values[index] = utils.bitcast(functools.reduce(arith.ori, [field(w, *f) for f in fields]), pair)
        return tuple(
            fragmented_array.FragmentedArray(
                _registers=values.reshape(into.registers_shape(shape)), _layout=into, _is_signed=None
            )
            for values in found
        )

    return decode(words)  # pyright: ignore[reportCallIssue]: the decorator takes the context away
