"""Snapshots: loaded weights on disk, as they lie in memory, to be restored onto any mesh that they fit.

A snapshot is a folder: `weights/`, Orbax's data, and `snapshot.json`, the manifest, which is written last. The manifest
says what the weights were made from, what they are and which files hold them, so that nothing is restored that loading
would not give.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mimo_jax.checkpoint import BackboneCheckpoint, DrafterCheckpoint
from mimo_jax.export import check_room
from mimo_jax.safetensors_reader import INDEX_NAME, name_some
from sharding.distributed import agree

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised whenever the arrays that loading makes of a checkpoint change their layout or meaning."""

MANIFEST = "snapshot.json"
_WEIGHTS = "weights"
_CHUNK_BYTES = 1 << 26  # what is read at once: a device of another mesh reads little that it does not own
_AT_A_TIME = 1 << 28
_WHOLE_BYTES = 1 << 25  # of larger files, only samples are read before the weights are
_SAMPLES, _SAMPLE_BYTES = 64, 4096

Sources = Mapping[str, BackboneCheckpoint | DrafterCheckpoint | None]


class SnapshotError(ValueError):
    """A folder that cannot serve as the snapshot that is asked for, and why."""


def restore_or_load[T](
    folder: Path, sources: Sources, options: Mapping[str, str], outline: T, load: Callable[[], T]
) -> T:
    """Weights from a snapshot; where there is none yet, they are loaded and one is made.

    Args:
        folder: Of the snapshot. Nothing in it is overwritten.
        sources: The checkpoints that weights come from, by component.
        options: What else decides their values, by the option's name.
        outline: The tree of `jax.ShapeDtypeStruct`, with shardings, that `load` gives.
        load: Loads them.

    Raises:
        SnapshotError: The folder holds a snapshot of something else, an unfinished or damaged one, or no snapshot.
        HostsError: Several processes do not see the same.
    """
    expected = {"format": FORMAT, "options": dict(options), "files": _files(sources), "arrays": _described(outline)}
    there = _exists(folder)
    agree({"snapshots, or checkpoints for them": (there, expected)})
    if there:
        return _restore(folder, expected, outline)
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(outline)))
    weights = load()
    try:
        _save(folder, expected, weights)
    except Exception as error:  # Orbax raises whatever it meets; what was loaded is not lost for it
        logger.warning("%s: the snapshot could not be written (%s); delete the folder", folder, _first_line(error))
    return weights


def _exists(folder: Path) -> bool:
    """Whether there is a snapshot; raises `SnapshotError` where none could be put."""
    if (folder / MANIFEST).is_file():
        return True
    if folder.exists() and not folder.is_dir():
        raise SnapshotError(f"{folder}: is a file, and a snapshot needs a folder; name another folder")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if names and all(name.startswith((_WEIGHTS, MANIFEST)) for name in names):
        raise _refusal(folder, f"holds an unfinished snapshot, without {MANIFEST}: it is being written, or was stopped")
    if names:
        raise SnapshotError(
            f"{folder}: is not empty and no snapshot (it holds {name_some(names, 3)}); name another folder"
        )
    return False


def _refusal(folder: Path, reason: str) -> SnapshotError:
    return SnapshotError(f"{folder}: {reason}; delete it, or name another folder for the snapshot")


def _files(sources: Sources) -> dict[str, dict[str, Any]]:
    """Size and digest of every file that weights come from."""
    found = {}
    for component, source in sources.items():
        if source is None:
            continue
        paths = {source.where / "config.json", *(tensor.file.path for tensor in source.tensors)}
        paths |= {source.where / INDEX_NAME} if (source.where / INDEX_NAME).exists() else set()
        paths |= set(source.where.glob("mask_embedding*"))
        found |= {f"{component}/{path.relative_to(source.where).as_posix()}": _identity(path) for path in sorted(paths)}
    return found


def _identity(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file; of a large one, of its header, samples of the rest and the time it was written.

    Reading all of it would take as long as loading.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            return {"bytes": size, "digest": hashlib.file_digest(file, "sha256").hexdigest()}
        digest = hashlib.sha256()
        if path.suffix == ".safetensors":
            digest.update(str(path.stat().st_mtime_ns).encode())
            length = file.read(8)
            digest.update(length + file.read(int.from_bytes(length, "little")))
        start = file.tell()
        for i in range(_SAMPLES):
            file.seek(start + (size - start) * i // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return {"bytes": size, "digest": digest.hexdigest()}


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _described(tree: Any) -> dict[str, str]:
    return {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in _named(tree).items()}


def _save(folder: Path, expected: Mapping[str, Any], weights: Any) -> None:
    arrays = _named(weights)
    at_a_time = max(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays.values())
    settings = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
    with _checkpointer(at_a_time) as checkpointer:
        checkpointer.save((folder / _WEIGHTS).absolute(), ocp.args.PyTreeSave(arrays, save_args=settings))
    checksums = _checksums(arrays)
    if jax.process_index() != 0:
        return
    files = sorted(path for path in (folder / _WEIGHTS).rglob("*") if path.is_file())
    data = {path.relative_to(folder).as_posix(): _identity(path) for path in files}
    whole = {**expected, "checksums": checksums, "data": data}
    partial_file = folder / f"{MANIFEST}.partial"
    with partial_file.open("w", encoding="utf-8") as file:
        json.dump(whole, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial_file.replace(folder / MANIFEST)


def _restore[T](folder: Path, expected: Mapping[str, Any], outline: T) -> T:
    manifest = _manifest(folder)
    for problem in (_other_format, _other_options, _other_files, _other_arrays):
        if reason := problem(manifest, expected):
            raise _refusal(folder, reason)
    data = {name: _identity(folder / name) for name in manifest["data"] if (folder / name).is_file()}
    if changed := _changed(manifest["data"], data):
        raise _refusal(folder, f"is damaged: {changed}")
    wanted = _named(outline)
    try:
        with _checkpointer() as checkpointer:
            described = checkpointer.metadata((folder / _WEIGHTS).absolute()).item_metadata
        if described is None:
            raise ValueError(f"Orbax finds no arrays in {_WEIGHTS}")
        stored = described.tree
        at_a_time = max(_read_bytes(leaf, stored[name].storage.chunk_shape) for name, leaf in wanted.items())
        with _checkpointer(at_a_time) as checkpointer:
            arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
            request = ocp.args.PyTreeRestore(wanted, restore_args=arguments)
            arrays = checkpointer.restore((folder / _WEIGHTS).absolute(), request)
    except (MemoryError, jax.errors.JaxRuntimeError):  # too little memory says nothing about the snapshot
        raise
    except Exception as error:  # Orbax raises bare exceptions for data that it cannot read
        raise _refusal(folder, f"cannot be read, and is probably damaged: {_first_line(error)}") from error
    checksums = _checksums(arrays)
    if wrong := [name for name, checksum in checksums.items() if checksum != manifest["checksums"].get(name)]:
        raise _refusal(folder, f"is damaged: the checksums of these arrays differ: {name_some(wrong, 3)}")
    return jax.tree.unflatten(jax.tree.structure(outline), [arrays[name] for name in wanted])


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        shaped = isinstance(manifest, dict) and type(manifest["format"]) is int
        if shaped and manifest["format"] == FORMAT:
            parts = ("options", "files", "arrays", "checksums", "data")
            shaped = all(isinstance(manifest[part], dict) for part in parts)
    except (OSError, ValueError, KeyError) as error:
        raise _refusal(folder, f"is damaged: {MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    if not shaped:
        raise _refusal(folder, f"is damaged: {MANIFEST} is no manifest of a snapshot")
    return manifest


def _other_format(manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    if manifest["format"] == expected["format"]:
        return None
    return f"has snapshot format {manifest['format']}, and {expected['format']} is expected"


def _other_options(manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    then, now = manifest["options"], expected["options"]
    differing = [f"{k} {_then_and_now(then.get(k), now.get(k))}" for k in {**then, **now} if then.get(k) != now.get(k)]
    return f"was made with other options: {_some(differing)}" if differing else None


def _other_files(manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    changed = _changed(manifest["files"], expected["files"])
    return f"was made of another checkpoint, or before it changed: {changed}" if changed else None


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which files differ, and how; empty if none do."""
    differing = []
    for name in sorted({*then, *now}):
        before, after = (f"{files[name]['bytes']:,} bytes" if name in files else None for files in (then, now))
        if before != after:
            differing.append(f"{name} {_then_and_now(before, after)}")
        elif then[name] != now[name]:
            differing.append(f"{name} has other contents of the same size")
    return _some(differing)


def _other_arrays(manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    then, now = manifest["arrays"], expected["arrays"]
    differing = [f"{k} {_then_and_now(then.get(k), now.get(k))}" for k in {**then, **now} if then.get(k) != now.get(k)]
    return f"holds other arrays than this topology and version use: {_some(differing)}" if differing else None


def _some(problems: list[str]) -> str:
    return "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")


def _then_and_now(then: Any, now: Any) -> str:
    return f"was {then if then is not None else 'absent'} and is {now if now is not None else 'absent'}"


def _first_line(error: BaseException) -> str:
    """The beginning of what the innermost cause says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _checkpointer(at_a_time: int = 0) -> ocp.Checkpointer:
    """Orbax, holding on the host at most as many bytes at a time as the largest request takes, or as `_AT_A_TIME` says.

    Data is not compressed: packed weights hardly shrink, and restoring takes several times as long.
    """
    limited = ("save_concurrent_gb", "save_device_host_concurrent_gb", "restore_concurrent_gb")
    limits: Any = dict.fromkeys(limited, (max(at_a_time, _AT_A_TIME) + 1) / 10**9)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False, **limits))


def _read_bytes(leaf: jax.ShapeDtypeStruct, chunk: tuple[int, ...]) -> int:
    """At most what is read for one device: the chunks that its part touches."""
    assert leaf.sharding is not None
    total = leaf.dtype.itemsize
    for whole, mine, size in zip(leaf.shape, leaf.sharding.shard_shape(leaf.shape), chunk, strict=True):
        total *= min(math.ceil(whole / size), mine // size + 2) * size
    return total


def _checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The sum of each array as 32-bit numbers (16 or 8 where rows do not divide so), modulo 2**32.

    It is the same on every mesh, and computed where the weights are.
    """
    return {name: int(np.asarray(value)) for name, value in _sums(dict(arrays)).items()}


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

    def total(array: jax.Array) -> jax.Array:
        together = math.gcd(array.shape[-1], 4 // array.dtype.itemsize)
        if together > 1:
            array = array.reshape(*array.shape[:-1], -1, together)
        return jnp.sum(jax.lax.bitcast_convert_type(array, unsigned[array.dtype.itemsize * together]), dtype=jnp.uint32)

    def in_turn(array: jax.Array) -> jax.Array:
        # numbers of several elements are copies: of one layer at a time, which no mesh cuts
        return jnp.sum(jax.lax.map(total, array), dtype=jnp.uint32) if array.ndim > 2 else total(array)

    return jax.tree.map(in_turn, arrays)
