"""How fast weights come into memory, beside reading the same bytes and nothing else."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.checkpoint import BackboneCheckpoint, DrafterCheckpoint, default_readers
from mimo_jax.config import BackboneConfig, DrafterConfig
from mimo_jax.device_arrays import STRIP_BYTES
from mimo_jax.evaluation.bench import Spread
from mimo_jax.model import LoadOptions, find_drafter, load_model
from mimo_jax.progress import Report
from mimo_jax.safetensors_reader import StoredTensor
from mimo_jax.snapshot import MANIFEST


@dataclass(frozen=True)
class LoadResult:
    """One way to get at a model's weights."""

    what: str
    nbytes: int
    """Bytes on disk that were read."""
    seconds: Spread
    """Of all that is done until the model is ready."""
    owned_bytes: int | None = None
    """Bytes of arrays that devices of this process hold in the end."""
    host_bytes: int | None = None
    """Most host memory at any time above what was used before; None where the system does not tell."""

    @property
    def gigabytes_per_second(self) -> float:
        """By the median, in units of 10**9 bytes."""
        return self.nbytes / self.seconds.median / 1e9

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"gigabytes_per_second": self.gigabytes_per_second}


def bench_load(folder: Path, options: LoadOptions, *, runs: int, progress: Report | None = None) -> list[LoadResult]:
    """Load a model `runs` times and read its bytes as often, in turn; with a snapshot in `options`, restore it, too.

    The files are read once before anything is timed, so that they are in the page cache if it has room for them.

    Raises:
        ConfigError, CheckpointError, TopologyError, SnapshotError: As `load_model`.
    """
    tensors = _tensors(folder, options)
    stored = sum(t.nbytes for t in tensors)
    plain = replace(options, snapshot=None)
    read_raw(tensors)
    raw, loaded, restored = [], [], []
    before = _memory("VmRSS")
    seconds, owned = _load(folder, plain, progress)  # compiles what loading needs, and shows the most memory
    peak = _memory("VmHWM")
    if options.snapshot is not None:
        _load(folder, options, progress)
    for _ in range(runs):
        begin = time.perf_counter()
        read_raw(tensors)
        raw.append(time.perf_counter() - begin)
        seconds, owned = _load(folder, plain, progress)
        loaded.append(seconds)
        if options.snapshot is not None:
            restored.append(_load(folder, options, progress)[0])
    more = None if before is None or peak is None else peak - before
    found = [
        LoadResult("raw read", stored, Spread.of(raw)),
        LoadResult("load", stored, Spread.of(loaded), owned, more),
    ]
    if options.snapshot is not None:
        size = sum(p.stat().st_size for p in options.snapshot.rglob("*") if p.is_file() and p.name != MANIFEST)
        found.append(LoadResult("restore", size, Spread.of(restored), owned))
    return found


def read_raw(tensors: list[StoredTensor]) -> None:
    """Read tensors as loading does, by the same number of readers, and forget them."""

    def read(tensor: StoredTensor, start: int) -> None:
        stop = min(start + STRIP_BYTES, tensor.nbytes)
        tensor.file.pread(np.empty(stop - start, np.uint8), tensor.start + start)

    with ThreadPoolExecutor(default_readers()) as pool:
        strips = [(tensor, start) for tensor in tensors for start in range(0, tensor.nbytes, STRIP_BYTES)]
        for _ in pool.map(lambda strip: read(*strip), strips):
            pass


def _tensors(folder: Path, options: LoadOptions) -> list[StoredTensor]:
    config = BackboneConfig.from_folder(folder)
    tensors = BackboneCheckpoint(folder, config, options.qkv_layout).tensors
    drafter = find_drafter(folder, options.drafter)
    if drafter is not None:
        tensors += DrafterCheckpoint(drafter, DrafterConfig.from_folder(drafter)).tensors
    return tensors


def _load(folder: Path, options: LoadOptions, progress: Report | None) -> tuple[float, int]:
    """Seconds, and bytes that devices hold."""
    begin = time.perf_counter()
    params = jax.block_until_ready(load_model(folder, options, progress).params)
    seconds = time.perf_counter() - begin
    return seconds, sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)


def _memory(field: str) -> int | None:
    """What /proc tells of this process: VmRSS, now; VmHWM, at most so far."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), None)
