"""Checkpoint folders in Hugging Face layout, written tensor by tensor and put in place as a whole.

Nothing here holds a model: each tensor is made when its turn comes and written in pieces.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.safetensors_reader import DTYPE_BITS, INDEX_NAME, CheckpointError

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    """As safetensors spells it, such as `BF16`."""
    shape: tuple[int, ...]
    produce: Callable[[], Iterable[np.ndarray]]
    """Makes the values in row-major order, in pieces of any size whose bytes are the tensor's."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return DTYPE_BITS[self.dtype] * math.prod(self.shape) // 8


def write_tensors(
    folder: Path,
    tensors: Sequence[OutputTensor],
    *,
    prefix: str = "model",
    metadata: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write tensors into shards `PREFIX-00001-of-00002.safetensors` and an index.

    Args:
        folder: Exists and holds none of these files.
        tensors: In the order they are to lie; inside a shard wider dtypes come first, so that all are aligned.
        prefix: Beginning of the shards' names.
        metadata: For the index, beside `total_size`.
        shard_bytes: A shard ends before it would pass this, unless one tensor alone does.
        progress: Told of bytes as they are written.

    Raises:
        ValueError: Two tensors have one name, or a tensor's values are not of its size.
    """
    if len({t.name for t in tensors}) != len(tensors):
        raise ValueError("two tensors have the same name")
    shards: list[list[OutputTensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or (tensor.nbytes and size + tensor.nbytes > shard_bytes):
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"{prefix}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, sorted(shard, key=lambda t: -DTYPE_BITS[t.dtype]), progress or (lambda _: None))
        weight_map |= dict.fromkeys((t.name for t in shard), name)
    total = {"total_size": sum(t.nbytes for t in tensors)}
    write_json(folder / INDEX_NAME, {"metadata": total | dict(metadata or {}), "weight_map": weight_map})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as Hugging Face libraries do."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, that becomes `out` when all went well and vanishes otherwise.

    Args:
        out: Must not exist, or be empty.
        overwrite: Replace `out` if it is a checkpoint folder (has a `config.json`).

    Raises:
        CheckpointError: `out` is in the way.
    """
    occupied = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if occupied and not overwrite:
        raise CheckpointError(f"{out}: already exists; choose another folder or ask to overwrite it")
    if occupied and not (out / "config.json").is_file():
        raise CheckpointError(f"{out}: exists and is no checkpoint folder; it will not be replaced")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
            os.replace(out, old / "replaced")
            os.replace(partial, out)
            shutil.rmtree(old)
        else:
            os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_room(out: Path, needed: int) -> None:
    """Raise `CheckpointError` unless the disk holds this many bytes and a little more."""
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed + needed // 50 + (1 << 20):
        raise CheckpointError(f"{out}: the checkpoint takes {needed:,} bytes, the disk has {free:,} free")


def _write_shard(path: Path, tensors: Sequence[OutputTensor], progress: Callable[[int], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            written = 0
            for piece in tensor.produce():
                data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                file.write(memoryview(data))
                written += len(data)
                progress(len(data))
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes were made, {tensor.nbytes} are needed")
        file.flush()
        os.fsync(file.fileno())
