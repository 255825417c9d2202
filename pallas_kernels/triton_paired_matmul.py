"""A grouped matmul with pairs of MXFP4 weights as checkpoints pack them, in Triton.

A 32-bit word of codes holds eight inputs. Shifts and masks take one code from each of its halves at a time, so that
the codes of a register are inputs k and k + 4: rows come in planes, of which plane p holds the inputs 8 * i + p, and
every plane is a product of its own. Weights are the first operand, decoded in registers, and rows the second.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

WORD = tl.constexpr(8)
"""Inputs of a word of codes, and planes of rows."""
BLOCK = tl.constexpr(32)
"""Inputs of a scale."""


@triton.jit
def paired_matmul(
    x, codes, scales, layer, tile_expert, tile_first, tile_rows, count,
    out,
    experts: tl.constexpr, inputs: tl.constexpr, outputs: tl.constexpr,
    swiglu: tl.constexpr, rows: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of rows with a block of its expert's pair of weights; program (block, tile).

    Args:
        x: [rows, 8, inputs / 8] bfloat16; rows of a tile may be read beyond those that are the tile's.
        codes: [layers, experts, 2, outputs, inputs / 2] uint8, the even element in the low nibble.
        scales: [layers, experts, 2, outputs, inputs / 32] uint8.
        layer: [1] int32.
        tile_expert: [tiles] int32.
        tile_first: [tiles] int32: the tile's first row.
        tile_rows: [tiles] int32.
        count: [1] int32: tiles that there are.
        out: bfloat16. With `swiglu` silu(first) * second [rows, 8, outputs / 8], in planes like x; otherwise both
            results [rows, 2, outputs].
        experts: Of a layer.
        inputs: A multiple of `depth`.
        outputs: Of one of the pair, a multiple of `width`.
        swiglu: See out.
        rows: Of a tile.
        width: Outputs of a block.
        depth: Inputs of a step, a multiple of 128.
    """
    tile = tl.program_id(1)
    if tile >= tl.load(count):
        return
    expert = tl.load(layer).to(tl.int64) * experts + tl.load(tile_expert + tile)
    row = tl.load(tile_first + tile).to(tl.int64) + tl.arange(0, rows)
    column = tl.program_id(0) * width + tl.arange(0, width)
    output = column % (outputs // WORD) * WORD + column // (outputs // WORD) if swiglu else column

    word = tl.arange(0, depth // WORD)
    block = tl.arange(0, depth // BLOCK)
    words_at = codes.to(tl.pointer_type(tl.uint32)) + expert * (2 * outputs * (inputs // WORD))
    words_at += output[:, None] * (inputs // WORD) + word[None, :]
    scales_at = scales + expert * (2 * outputs * (inputs // BLOCK))
    scales_at += output[:, None] * (inputs // BLOCK) + block[None, :]
    x_at = x + row[None, :] * inputs + word[:, None]

    first = tl.full((width, rows), 0, tl.float32)
    second = tl.full((width, rows), 0, tl.float32)
    for _ in range(inputs // depth):
        for half in tl.static_range(2):
            words = tl.load(words_at + half * (outputs * (inputs // WORD)))
            exponents = tl.load(scales_at + half * (outputs * (inputs // BLOCK))).to(tl.uint16)
            powers = (exponents << 7).to(tl.bfloat16, bitcast=True)
            powers = tl.broadcast_to(powers[:, :, None], (width, depth // BLOCK, BLOCK // WORD))
            powers = powers.reshape(width, depth // WORD)
            total = second if half else first
            for plane in tl.static_range(WORD // 2):
                # a code's sign goes to bit 15 and its other bits to 8...6: value * 2**-126 in bfloat16
                magnitudes = words << 6 - 4 * plane if plane < 2 else words >> 4 * plane - 6
                pairs = (words << 12 - 4 * plane) & 0x80008000 | magnitudes & 0x01C001C0
                low = pairs.to(tl.uint16).to(tl.bfloat16, bitcast=True) * 2.0**126 * powers
                high = (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True) * 2.0**126 * powers
                total = tl.dot(low, tl.load(x_at + plane * (inputs // WORD)), total)
                total = tl.dot(high, tl.load(x_at + (plane + WORD // 2) * (inputs // WORD)), total)
            if half:
                second = total
            else:
                first = total
        words_at += depth // WORD
        scales_at += depth // BLOCK
        x_at += depth // WORD

    out_at = out + row[None, :] * (outputs if swiglu else 2 * outputs) + column[:, None]
    mine = (tl.arange(0, rows) < tl.load(tile_rows + tile))[None, :]
    if swiglu:
        tl.store(out_at, (first / (1 + tl.exp(-first)) * second).to(tl.bfloat16), mask=mine)
    else:
        tl.store(out_at, first.to(tl.bfloat16), mask=mine)
        tl.store(out_at + outputs, second.to(tl.bfloat16), mask=mine)
