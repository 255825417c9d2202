"""Checkpoints of backbone and drafter: proven complete when opened, read when loaded.

checkpoint = BackboneCheckpoint(folder, config)
params = checkpoint.load(declared)
"""

import logging
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mimo_jax.backbone_plan import plan_backbone
from mimo_jax.checkpoint_plan import FLOATS, Claims, Summary
from mimo_jax.config import BackboneConfig, DrafterConfig
from mimo_jax.device_arrays import Outliner, Placer, Progress, Sharding, load_leaf
from mimo_jax.drafter_plan import plan_drafter
from mimo_jax.params import Declared, Params
from mimo_jax.qkv_layout import QkvLayout
from mimo_jax.safetensors_reader import (
    CheckpointError,
    CheckpointFolder,
    SafetensorsFile,
    StoredTensor,
    name_some,
    shorten,
)
from mimo_jax.stored_weights import Leaf
from mimo_jax.torch_sidecar import read_mask_embedding
from pallas_kernels.fp8 import COLUMNS as FP8_COLUMNS

logger = logging.getLogger(__name__)

Storage = Literal["packed", "expanded"]

_MASK_NAMES = ("mask_embedding", "mask_embedding.weight")


def default_readers() -> int:
    """Threads that read and decode."""
    return min(8, os.cpu_count() or 1)


class _Checkpoint:
    """Leaves and a summary, and how to load them."""

    def __init__(self, where: Path, leaves: list[Leaf], summary: Summary, vectors: Mapping[str, np.ndarray]):
        self.where, self.summary = where, summary
        self._leaves, self._vectors = leaves, vectors

    @property
    def tensors(self) -> list[StoredTensor]:
        """What loading reads, in the order of the files."""
        sources = [source for leaf in self._leaves for source in leaf.sources]
        found = {(str(t.file.path), t.start): t for source in sources for t in (source.tensor, *source.scales)}
        return [found[key] for key in sorted(found)]

    @cached_property
    def total_bytes(self) -> int:
        """Of the weights as they are stored; FP8 scales, a few parts in ten thousand, are not counted."""
        return sum(leaf.nbytes for leaf in self._leaves)

    def load(
        self,
        declared: Declared[Any],
        *,
        storage: Storage = "packed",
        sharding: Sharding | None = None,
        progress: Progress | None = None,
        readers: int | None = None,
    ) -> Params:
        """Read the parameters.

        Args:
            declared: The module that wants them; its dtypes hold for whatever is not kept packed.
            storage: Whether quantised weights stay as they are stored, or are expanded while they are read.
            sharding: From logical axes and shape to where an array lives; default: the first local device. For packed
                weights it is asked about codes, values and scales apart, with the axes of the weight.
            progress: Told of bytes as they are read; they add up to `read_bytes`.
            readers: Threads that read and decode; default: the number of CPUs, at most 8.

        Raises:
            CheckpointError: The formats cannot be kept packed (before any data is read), a file has become
                shorter, or a scale is no number.
        """
        return self._place(declared, storage, Placer(sharding, progress, readers or default_readers()))

    def outline(self, declared: Declared[Any], storage: Storage, sharding: Sharding | None = None) -> Params:
        """The shapes, dtypes and shardings of what `load` would give; no data is read.

        Raises:
            CheckpointError: The formats cannot be kept packed.
        """
        return self._place(declared, storage, Outliner(sharding))

    def read_bytes(self, declared: Declared[Any], storage: Storage, sharding: Sharding | None = None) -> int:
        """What `load` reports to `progress`: bytes that this process reads, twice where its devices have copies."""
        outliner = Outliner(sharding)
        self._place(declared, storage, outliner)
        return outliner.nbytes

    def _place(self, declared: Declared[Any], storage: Storage, placer: Placer) -> Params:
        shapes, axes = _flatten(declared.shapes), _flatten(declared.axes)
        leaves = [leaf.fitted(shapes[leaf.path].shape) if leaf.path in shapes else leaf for leaf in self._leaves]
        offered = {leaf.path: leaf.shape for leaf in leaves} | {(k,): v.shape for k, v in self._vectors.items()}
        if offered != {path: s.shape for path, s in shapes.items()}:
            raise ValueError(f"{self.where}: the declared module was made from another configuration")
        packed = self._packed if storage == "packed" else set()
        params: Params = {}
        with placer:
            for leaf in leaves:
                node = params
                for key in leaf.path[:-1]:
                    node = node.setdefault(key, {})
                dtype = np.dtype(shapes[leaf.path].dtype)
                node[leaf.path[-1]] = load_leaf(leaf, dtype, leaf.path in packed, placer, axes[leaf.path])
            for key, vector in self._vectors.items():
                params[key] = placer.put(vector.astype(shapes[(key,)].dtype), axes[(key,)])
        return params

    @cached_property
    def _packed(self) -> set[tuple[str, ...]]:
        """Paths of the leaves that stay packed: those stored in one quantised format, alike for the experts."""
        packed: set[tuple[str, ...]] = set()
        experts: dict[tuple[str, ...], set[str]] = {}
        for leaf in self._leaves:
            if len(leaf.lead) > 1:
                experts.setdefault(leaf.path[:-1], set()).update(leaf.formats)
            if leaf.formats == {"plain"}:
                continue
            if len(leaf.formats) > 1 and len(leaf.lead) <= 1:
                reason = f"is stored as {' and '.join(sorted(leaf.formats))} in different layers"
            elif "fp8" in leaf.formats and leaf.sources[0].scale_columns % FP8_COLUMNS:
                raise CheckpointError(
                    f"{self.where}: {'/'.join(leaf.path)} has FP8 tiles of {leaf.sources[0].scale_columns} columns; "
                    f"packed weights need a multiple of {FP8_COLUMNS}. Load with expanded storage"
                )
            else:
                packed.add(leaf.path)
                continue
            logger.warning("%s: %s %s: it is expanded", self.where, "/".join(leaf.path), reason)
        for path, formats in experts.items():
            if len(formats) > 1:
                raise CheckpointError(
                    f"{self.where}: experts of {'/'.join(path)} are stored as {' and '.join(sorted(formats))}; "
                    f"packed experts must all have one format. Load with expanded storage"
                )
        return packed


class BackboneCheckpoint(_Checkpoint):
    """The text backbone of a checkpoint folder in Hugging Face layout."""

    def __init__(self, folder: Path, config: BackboneConfig, qkv_layout: QkvLayout = "auto"):
        """Open a checkpoint and prove it complete; no tensor is read.

        Args:
            folder: Holds `model.safetensors.index.json` and the files it names, or `model.safetensors`.
            config: The folder's `config.json`.
            qkv_layout: How rows of fused qkv tensors lie, if it cannot be known from the files.

        Raises:
            CheckpointError: Something is missing, unexpected, stored twice, or of a wrong dtype or shape.
        """
        files = CheckpointFolder(folder)
        claims = Claims(files.tensors, str(folder), config.quantization.fp8_block if config.quantization else None)
        leaves = plan_backbone(claims, config, qkv_layout, files.metadata)
        summary = claims.prove()
        super().__init__(folder, leaves.proven(), summary, {})


class DrafterCheckpoint(_Checkpoint):
    """A DFlash drafter's folder: its weights, and the mask vector beside them."""

    def __init__(self, folder: Path, config: DrafterConfig):
        """Open a drafter and prove it complete; only the mask vector's sidecar is read.

        Args:
            folder: Holds the weights as a backbone's folder does, and `mask_embedding.pt`, unless the vector is among
                the weights (`mask_embedding`) or in a `mask_embedding*.safetensors`.
            config: The folder's `config.json`.

        Raises:
            CheckpointError: Something is missing, unexpected, stored twice, or of a wrong dtype or shape; or the mask
                vector belongs to another token.
        """
        tensors = _without_prefix(CheckpointFolder(folder))
        claims = Claims(tensors, str(folder), None)
        leaves = plan_drafter(claims, config)
        mask = _mask_vector(folder, claims, tensors, config)
        summary = claims.prove()
        super().__init__(folder, leaves.proven(), summary, {"mask_embedding": mask})


def _without_prefix(files: CheckpointFolder) -> dict[str, StoredTensor]:
    """A drafter's tensors by the name that follows `model.`, which some exporters write."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in files.tensors.items()}
    if len(tensors) != len(files.tensors):
        twice = [n for n in tensors if n in files.tensors and f"model.{n}" in files.tensors]
        raise CheckpointError(f"{files.folder}: with and without a leading `model.`: {name_some(twice)}")
    return tensors


def _mask_vector(
    folder: Path, claims: Claims, tensors: Mapping[str, StoredTensor], config: DrafterConfig
) -> np.ndarray:
    """The vector [hidden] that stands in a block for every token not yet known.

    It may stand in the sidecar, among the weights, or in a file of its own; where it stands twice, both must be equal.
    """
    found: dict[str, np.ndarray] = {}
    ids: dict[str, object] = {}
    sidecar = folder / "mask_embedding.pt"
    if sidecar.exists():
        ids[sidecar.name], found[sidecar.name] = read_mask_embedding(sidecar, config.hidden_size)
    for name in _MASK_NAMES:
        if name in tensors and (weight := claims.vector("mask embedding", name, config.hidden_size)):
            found[name] = weight.tensor.read()
    for path in sorted(folder.glob("mask_embedding*.safetensors")):
        file = SafetensorsFile(path)
        fitting = [t for t in file.tensors.values() if t.dtype in FLOATS and t.shape == (config.hidden_size,)]
        if len(fitting) != 1 or len(file.tensors) != 1:
            raise CheckpointError(f"{path}: expected one float tensor [{config.hidden_size}] and nothing else")
        found[path.name] = fitting[0].read()
        if "mask_token_id" in file.metadata:
            ids[path.name] = file.metadata["mask_token_id"]
    if not found:
        raise CheckpointError(
            f"{folder}: no mask vector: neither mask_embedding.pt nor a tensor mask_embedding; without it the drafter "
            f"cannot fill a block"
        )
    for name, token in ids.items():
        if str(token) != str(config.mask_token_id):
            raise CheckpointError(
                f"{folder / name}: is the vector of token {shorten(token)}, but mask_token_id in config.json is "
                f"{config.mask_token_id}"
            )
    (first, vector), *others = found.items()
    for name, other in others:
        if not np.array_equal(vector.astype(np.float32), other.astype(np.float32)):
            raise CheckpointError(f"{folder}: {first} and {name} hold different mask vectors")
    return vector


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of nested dictionaries by their path."""
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        leaves |= _flatten(value, (*path, key)) if isinstance(value, Mapping) else {(*path, key): value}
    return leaves
