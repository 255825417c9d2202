"""Safetensors files and folders of them, read by byte range.

The whole header is proven before anything is read: every tensor has a known dtype and a sane shape, its bytes lie
inside the file, and together the tensors cover the data section with neither hole nor overlap. Nothing is allocated
that the file's own size does not justify.
"""

import json
import logging
import math
import os
import re
import stat
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

logger = logging.getLogger(__name__)

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Every dtype of the format and its width."""

NUMPY_DTYPES: dict[str, np.dtype] = {
    "U8": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),  # the scale byte itself: its exponent is what readers want
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""The dtypes that can be read, as the array they become."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_INDEX = 1_000_000_000
_MAX_RANK = 16
_MAX_DIM = 2**62
_READ_BYTES = 1 << 28  # a single preadv moves less than 2 GiB


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the file and the tensor that say so."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    dtype: str
    """As the format spells it, such as `BF16`."""
    shape: tuple[int, ...]
    file: "OpenFile"
    start: int
    """First byte, counted from the start of the file."""
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)} in {self.file.path.name})"

    def read_into(self, out: np.ndarray, first_row: int = 0) -> None:
        """Fill `out` with consecutive rows.

        Args:
            out: C-contiguous [rows, ...] of the dtype in `NUMPY_DTYPES`, where ... is this tensor's shape without its
                first axis.
            first_row: Row of the tensor that becomes row 0 of `out`.

        Raises:
            CheckpointError: The file has become shorter, or cannot be read.
        """
        if out.dtype != NUMPY_DTYPES[self.dtype] or out.shape[1:] != self.shape[1:] or not out.flags.c_contiguous:
            raise ValueError(f"{self.name}: a buffer {out.dtype} {out.shape} cannot hold rows of {self}")
        if not 0 <= first_row <= first_row + out.shape[0] <= self.shape[0]:
            raise ValueError(f"{self.name}: rows {first_row} .. {first_row + out.shape[0]} are not all there")
        row_bytes = self.nbytes // self.shape[0] if self.shape[0] else 0
        if out.nbytes:
            self.file.pread(out.reshape(-1).view(np.uint8), self.start + first_row * row_bytes)

    def read(self) -> np.ndarray:
        """The whole tensor."""
        if self.dtype not in NUMPY_DTYPES:
            raise CheckpointError(f"{self.file.path}: {self.name}: dtype {self.dtype} cannot be read here")
        out = np.empty(self.shape or (1,), NUMPY_DTYPES[self.dtype])
        if out.nbytes:
            self.file.pread(out.reshape(-1).view(np.uint8), self.start)
        return out.reshape(self.shape)


class OpenFile:
    """A file open for reading by byte range, closed when nothing refers to it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            # without O_NONBLOCK, opening a pipe would wait for somebody to write
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be opened ({error})") from None
        weakref.finalize(self, os.close, self._fd)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        self.size = status.st_size

    def pread(self, out: np.ndarray, offset: int) -> None:
        """Fill `out` [bytes] uint8 from `offset`."""
        view, done = memoryview(out), 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done : done + _READ_BYTES]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({error})") from None
            if count == 0:
                raise CheckpointError(f"{self.path}: ends at byte {offset + done}, {len(view) - done} bytes too early")
            done += count


class SafetensorsFile:
    """One file and its proven header."""

    def __init__(self, path: Path):
        """Open a file and prove its header.

        Raises:
            CheckpointError: The file cannot be opened or breaks the format; the message names it and the tensor.
        """
        self.path, self._file = path, OpenFile(path)
        size = self._file.size
        if size < 8:
            raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
        prefix = np.empty(8, np.uint8)
        self._file.pread(prefix, 0)
        length = int.from_bytes(prefix.tobytes(), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path}: the header would be {length} bytes long, but the file has {size} "
                f"(truncated, or not a safetensors file)"
            )
        header = np.empty(length, np.uint8)
        self._file.pread(header, 8)
        self.metadata, self.tensors = self._parse(header.tobytes(), 8 + length, size)

    def _parse(self, raw: bytes, data_start: int, size: int) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        header = parse_json_object(raw, self.path, "header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CheckpointError(f"{self.path}: __metadata__ must be an object of strings")
        tensors = {name: self._entry(name, entry, data_start, size) for name, entry in header.items()}
        end = data_start
        for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
            if tensor.start != end:
                kind = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
                raise CheckpointError(f"{self.path}: {tensor.name} {kind} (starts at {tensor.start}, expected {end})")
            end += tensor.nbytes
        if end != size:
            raise CheckpointError(f"{self.path}: has {size} bytes, its header accounts for {end}")
        return metadata, tensors

    def _entry(self, name: str, entry: Any, data_start: int, size: int) -> StoredTensor:
        def fail(reason: str) -> CheckpointError:
            return CheckpointError(f"{self.path}: {shorten(name)}: {reason}")

        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise fail("a header entry must have dtype, shape and data_offsets, and nothing else")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise fail(f"unknown dtype {shorten(dtype)}")
        if not _naturals(shape) or len(shape) > _MAX_RANK:
            raise fail(f"not a shape: {shorten(shape)}")
        if not _naturals(offsets) or len(offsets) != 2:
            raise fail(f"data_offsets must be two byte positions, not {shorten(offsets)}")
        begin, end = offsets
        if not begin <= end <= size - data_start:
            raise fail(f"data_offsets [{begin}, {end}] are not inside the {size - data_start} bytes of data")
        bits = DTYPE_BITS[dtype] * math.prod(shape)
        if bits % 8 or bits // 8 != end - begin:
            raise fail(f"{dtype} {shape} takes {bits / 8:.10g} bytes, data_offsets give it {end - begin}")
        return StoredTensor(name, dtype, tuple(shape), self._file, data_start + begin, end - begin)


class CheckpointFolder:
    """The tensors of a folder: those its index names, or those of its single `model.safetensors`.

    No other file is looked at, so a folder's subfolders (`dflash/`) keep their own tensors.
    """

    def __init__(self, folder: Path):
        """Open every file that the index names and prove that index and files agree.

        Raises:
            CheckpointError: A file is missing or broken, or index and files name different tensors.
        """
        self.folder = folder
        index = folder / INDEX_NAME
        if not index.exists():
            if not (folder / SINGLE_NAME).exists():
                raise CheckpointError(f"{folder}: has neither {INDEX_NAME} nor {SINGLE_NAME}")
            file = SafetensorsFile(folder / SINGLE_NAME)
            self.metadata: dict[str, Any] = dict(file.metadata)
            self.tensors = file.tensors
            return
        weight_map, self.metadata = _read_index(index)
        paths = {name: _inside(folder, value, index) for name, value in weight_map.items()}
        files = {path: SafetensorsFile(path) for path in dict.fromkeys(paths.values())}
        self.tensors = _agree(index, paths, files)
        total, found = self.metadata.get("total_size"), sum(t.nbytes for t in self.tensors.values())
        if total is not None and total != found:  # exporters get this one wrong, and nothing depends on it
            logger.warning("%s: metadata.total_size is %s, the tensors have %d bytes", index, shorten(total), found)


def parse_json_object(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON object in UTF-8 whose keys, at every depth, are distinct.

    Raises:
        CheckpointError: It is anything else; the message names the file and `what` was being read.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise CheckpointError(f"{path}: {shorten(twice)} occurs twice in the {what}")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=distinct)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {what} is not readable JSON ({shorten(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: the {what} must be a JSON object, not {type(value).__name__}")
    return value


def name_some(names: Iterable[str], at_most: int = 10) -> str:
    """Up to ten of the names, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - at_most} more" if len(listed) > at_most else ""
    return ", ".join(shorten(n) for n in listed[:at_most]) + more


def shorten(value: object, length: int = 120) -> str:
    """What a file says, safe to print in a message."""
    text = value if isinstance(value, str) else repr(value) if not isinstance(value, Exception) else str(value)
    text = re.sub(r"[^\x20-\x7e]", "?", text)
    return text if len(text) <= length else f"{text[:length]}..."


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < _MAX_DIM for v in value)


def _read_index(index: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise CheckpointError(f"{index}: {index.stat().st_size} bytes are too many for an index")
        raw = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error})") from None
    value = parse_json_object(raw, index, "index")
    weight_map, metadata = value.get("weight_map"), value.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object that names files, and not empty")
    if metadata is not None and not isinstance(metadata, dict):
        raise CheckpointError(f"{index}: metadata must be an object")
    return weight_map, metadata or {}


def _inside(folder: Path, value: Any, index: Path) -> Path:
    """The path of a file that the index names; it must stay in the folder (links in the folder may lead out)."""
    good = isinstance(value, str) and value.endswith(".safetensors") and not re.search(r"[\x00-\x1f\\:]", value)
    if not good or value.startswith("/") or any(part in ("..", "") for part in value.split("/")):
        raise CheckpointError(f"{index}: {shorten(value)} is not a safetensors file inside the folder")
    return folder / PurePosixPath(value)


def _agree(index: Path, paths: dict[str, Path], files: dict[Path, SafetensorsFile]) -> dict[str, StoredTensor]:
    problems: list[str] = []
    where: dict[str, list[Path]] = {}
    for path, file in files.items():
        for name in file.tensors:
            where.setdefault(name, []).append(path)
    if absent := [n for n, p in paths.items() if n not in files[p].tensors]:
        problems.append(f"not in the file the index names: {name_some(absent)}")
    if twice := [n for n, p in where.items() if len(p) > 1]:
        problems.append(f"in two files: {name_some(twice)}")
    if unnamed := [n for n in where if n not in paths]:
        problems.append(f"in a file but not in the index: {name_some(unnamed)}")
    if problems:
        raise CheckpointError(f"{index}: index and files disagree. Tensors {'; '.join(problems)}")
    return {name: files[path].tensors[name] for name, path in paths.items()}
