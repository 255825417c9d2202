"""What a model needs of a checkpoint, claimed name by name before any data is read.

Names are made from the configuration, never matched by substring, so a tensor of the multi-token-prediction layers
or of a tower cannot be taken for one of the backbone's. What nobody claims must be on the list of what is skipped.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mimo_jax.qkv_layout import RowMap, plain_rows
from mimo_jax.safetensors_reader import CheckpointError, StoredTensor, name_some
from mimo_jax.stored_weights import Format, Leaf, StoredWeight
from pallas_kernels.mxfp4 import BLOCK

FLOATS = ("BF16", "F16", "F32")
SCALE_SUFFIXES = ("_scale_inv", "_scale")

SKIPPED = {
    "mtp": re.compile(r"(model\.)?mtp\."),
    "vision": re.compile(r"(model\.)?(visual|vision_model)\."),
    "audio": re.compile(r"(model\.)?(audio_|speech_embeddings\.)"),
    "drafter": re.compile(r"dflash/"),
    "rotary caches": re.compile(r".*(\.inv_freq|cos_cached|sin_cached)$"),
}
"""Groups of tensors that are none of the text backbone's, by the beginning of their names."""


@dataclass(frozen=True)
class Part:
    """Some of a checkpoint's tensors: a component of the model, or a group that is skipped."""

    name: str
    tensors: int
    parameters: int
    """Weights, as the model counts them: two a byte where they are packed, and no scales."""
    nbytes: int
    dtypes: tuple[str, ...]
    """Stored dtypes, scales included."""


@dataclass(frozen=True)
class Summary:
    """What a checkpoint is."""

    parts: tuple[Part, ...]
    skipped: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return sum(part.parameters for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Stored bytes of the model, scales included."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Matrix:
    """A stored matrix whose dtype and shape fit, and its scale."""

    tensor: StoredTensor
    shape: tuple[int, int]
    format: Format
    scale: StoredTensor | None

    def weight(
        self, rows: RowMap | None, shape: tuple[int, int], scale_columns: int, *more: StoredTensor
    ) -> StoredWeight:
        """The weight whose rows lie at `rows`; `more` are scales put below or above this one's, in order."""
        scales = more or ((self.scale,) if self.scale else ())
        return StoredWeight(self.tensor, shape, self.format, rows, scales, scale_columns)


@dataclass
class _Tally:
    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    dtypes: set[str] = field(default_factory=set)

    def add(self, tensor: StoredTensor, parameters: int) -> None:
        self.tensors += 1
        self.parameters += parameters
        self.nbytes += tensor.nbytes
        self.dtypes.add(tensor.dtype)


class Claims:
    """Collects what is claimed and everything that is wrong; `prove` raises it all at once."""

    def __init__(self, tensors: Mapping[str, StoredTensor], where: str, fp8_block: tuple[int, int] | None):
        """Begin.

        Args:
            tensors: All there are.
            where: The checkpoint, for messages.
            fp8_block: Rows and columns of a tile of FP8 scales; None where the configuration tells of no FP8.
        """
        self.where, self.fp8_block = where, fp8_block
        self._tensors = tensors
        self._left = dict(tensors)
        self._missing: list[str] = []
        self._wrong: list[str] = []
        self._tallies: dict[str, _Tally] = {}

    def wrong(self, problem: str) -> None:
        """Note something that makes the checkpoint unusable."""
        self._wrong.append(problem)

    def vector(self, part: str, name: str, length: int, dtypes: tuple[str, ...] = FLOATS) -> StoredWeight | None:
        """Claim a tensor [length]; None and noted where it is missing or does not fit."""
        tensor = self._claim(part, name, length)
        return StoredWeight(tensor, (length,)) if tensor and self._fits(tensor, (length,), dtypes) else None

    def plain(
        self, part: str, name: str, shape: tuple[int, int], dtypes: tuple[str, ...] = FLOATS
    ) -> StoredWeight | None:
        """Claim a matrix [out, in] that is never quantised."""
        tensor = self._claim(part, name, math.prod(shape))
        return StoredWeight(tensor, shape) if tensor and self._fits(tensor, shape, dtypes) else None

    def linear(self, part: str, name: str, shape: tuple[int, int]) -> StoredWeight | None:
        """Claim a matrix [out, in] in any stored format, its rows in order."""
        found = self.matrix(part, name, shape)
        if found is None or found.format != "fp8":
            return found and found.weight(None, shape, BLOCK)
        assert self.fp8_block is not None
        if not self.scale_rows(found, math.ceil(shape[0] / self.fp8_block[0])):
            return None
        return found.weight(plain_rows(shape[0], self.fp8_block[0]), shape, self.fp8_block[1])

    def matrix(self, part: str, name: str, shape: tuple[int, int]) -> Matrix | None:
        """Claim a matrix [out, in] in any stored format, and its scale; rows of FP8 scales are the caller's to check.

        Formats are told by the stored dtype: floats have no scale, F8_E4M3 has `_scale_inv` (F32, multiplied in spite
        of its name), U8 has `_scale` (e8m0 bytes) and packs two MXFP4 codes in a byte.
        """
        scales = [s for s in SCALE_SUFFIXES if name + s in self._left]
        tensor = self._claim(part, name, math.prod(shape))
        if tensor is None:
            return None
        if tensor.dtype in FLOATS:
            for suffix in scales:
                self._claim(part, name + suffix, 0)
                self.wrong(f"{tensor} is not quantised but has a scale, {name}{suffix}")
            return Matrix(tensor, shape, "plain", None) if self._fits(tensor, shape, FLOATS) else None
        if tensor.dtype not in ("F8_E4M3", "U8"):
            self.wrong(f"{tensor}: no known way to store a weight; expected one of {', '.join(FLOATS)}, F8_E4M3, U8")
            for suffix in scales:
                self._claim(part, name + suffix, 0)
            return None
        format, suffix = ("fp8", "_scale_inv") if tensor.dtype == "F8_E4M3" else ("mxfp4", "_scale")
        scale = self._claim(part, name + suffix, 0)
        if scale is None or [suffix] != scales:
            for other in set(scales) - {suffix}:
                self._claim(part, name + other, 0)
                self.wrong(f"{tensor} has {name}{other}; {tensor.dtype} weights have {suffix} and nothing else")
            return None
        if format == "mxfp4":
            if shape[1] % BLOCK:
                self.wrong(f"{tensor}: MXFP4 needs a multiple of {BLOCK} columns, the configuration says {shape[1]}")
                return None
            fits = self._fits(tensor, (shape[0], shape[1] // 2), ("U8",))
            fits &= self._fits(scale, (shape[0], shape[1] // BLOCK), ("U8", "F8_E8M0"))
        elif self.fp8_block is None:
            self.wrong(f"{tensor} is FP8, but config.json has no quantization_config that tells its weight_block_size")
            return None
        else:
            fits = self._fits(tensor, shape, ("F8_E4M3",))
            rows = scale.shape[0] if scale.shape else 0
            fits &= self._fits(scale, (rows, math.ceil(shape[1] / self.fp8_block[1])), ("F32",))
        return Matrix(tensor, shape, format, scale) if fits else None

    def scale_rows(self, matrix: Matrix, *allowed: int) -> bool:
        """Whether FP8 scales have one of these numbers of rows; noted if not."""
        assert matrix.scale is not None
        if matrix.scale.shape[0] in allowed:
            return True
        expected = " or ".join(map(str, dict.fromkeys(allowed)))
        self.wrong(f"{matrix.scale}: expected {expected} rows of scales for {matrix.tensor}")
        return False

    def prove(self) -> Summary:
        """Everything claimed was there and fits, and all that is left is to be skipped.

        Raises:
            CheckpointError: With up to ten names of each kind of fault.
        """
        unexpected: list[str] = []
        skipped: dict[str, _Tally] = {}
        for name, tensor in self._left.items():
            group = next((g for g, pattern in SKIPPED.items() if pattern.match(name)), None)
            if group is None:
                unexpected.append(name)
            else:
                scale, packed = name.endswith(SCALE_SUFFIXES), f"{name}_scale" in self._tensors
                count = 0 if scale else math.prod(tensor.shape) * (2 if packed else 1)
                skipped.setdefault(group, _Tally()).add(tensor, count)
        problems = [
            f"{len(names):,} {kind}: {name_some(names)}"
            for kind, names in (("missing", self._missing), ("unexpected", unexpected))
            if names
        ]
        if self._wrong:
            more = f" (and {len(self._wrong) - 10} more)" if len(self._wrong) > 10 else ""
            problems.append("; ".join(self._wrong[:10]) + more)
        if problems:
            raise CheckpointError(f"{self.where}: tensors do not fit config.json. {'. '.join(problems)}")
        return Summary(_parts(self._tallies), _parts(skipped))

    def _claim(self, part: str, name: str, parameters: int) -> StoredTensor | None:
        tensor = self._left.pop(name, None)
        if tensor is None:
            self._missing.append(name)
            if len(self._missing) > len(self._tensors) + 1000:  # a configuration of another model, perhaps of any size
                self.prove()
        else:
            self._tallies.setdefault(part, _Tally()).add(tensor, parameters)
        return tensor

    def _fits(self, tensor: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> bool:
        if tensor.dtype not in dtypes:
            self.wrong(f"{tensor}: expected dtype {' or '.join(dtypes)}")
        elif tensor.shape != shape:
            self.wrong(f"{tensor}: expected shape {list(shape)}")
        else:
            return True
        return False


class Leaves:
    """Gathers the stored weights of every leaf."""

    def __init__(self) -> None:
        self._lead: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._sources: dict[tuple[str, ...], list[StoredWeight | None]] = {}
        self._head_rows: dict[tuple[str, ...], int] = {}

    def add(
        self, path: tuple[str, ...], lead: tuple[int, ...], *sources: StoredWeight | None, head_rows: int = 0
    ) -> None:
        """Add the next sources of a leaf whose leading axes are `lead`; K and V say how many rows a head has."""
        self._lead[path], self._head_rows[path] = lead, head_rows
        self._sources.setdefault(path, []).extend(sources)

    def proven(self) -> list[Leaf]:
        """The leaves, once it is proven that none of their sources is missing."""
        return [
            Leaf(p, self._lead[p], [s for s in found if s], self._head_rows[p]) for p, found in self._sources.items()
        ]


def _parts(tallies: Mapping[str, _Tally]) -> tuple[Part, ...]:
    return tuple(Part(name, t.tensors, t.parameters, t.nbytes, tuple(sorted(t.dtypes))) for name, t in tallies.items())
