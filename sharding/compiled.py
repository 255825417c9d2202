"""What a compiled program exchanges, read from its text."""

import re
from collections.abc import Iterator

import numpy as np

# bytes of an element, 1 for all others
_SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"


def collectives(text: str) -> Iterator[tuple[str, int]]:
    """Kind and bytes of every collective in a program; of one that starts and ends apart, at its start."""
    for shape, kind, start in re.findall(rf"= (\S+|\(.*?\)) ({_KINDS})(-start)?\(", text):
        parts = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
        sizes = [_SIZES.get(dtype, 1) * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in parts]
        # what starts gives its operands and its results
        yield kind, sum(sizes[len(sizes) // 2 :]) if start and shape.startswith("((") else sum(sizes)
