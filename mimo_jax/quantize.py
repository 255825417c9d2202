"""Plain post-training quantisation of a checkpoint folder to the release's layout: experts in MXFP4.

Nothing is calibrated: every weight is rounded by itself. Whatever is not quantised is copied byte for byte. Tensors
are read, encoded and written strip by strip, so the memory it takes does not grow with the checkpoint.
"""

import re
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mimo_jax.backbone_plan import plan_backbone
from mimo_jax.checkpoint_plan import FLOATS, Claims
from mimo_jax.config import BackboneConfig
from mimo_jax.export import SHARD_BYTES, OutputTensor, check_room, new_folder, write_json, write_tensors
from mimo_jax.hf_keys import read_json_object
from mimo_jax.presets import Preset, quantization_config
from mimo_jax.progress import Report, reporter
from mimo_jax.qkv_layout import QkvLayout, choose_chunks
from mimo_jax.quantization import encode_fp8
from mimo_jax.safetensors_reader import (
    INDEX_NAME,
    NUMPY_DTYPES,
    CheckpointError,
    CheckpointFolder,
    StoredTensor,
    name_some,
)
from mimo_jax.stored_weights import StoredWeight
from mimo_jax.synthesize import backbone_outputs
from pallas_kernels import mxfp4

Linears = Literal["keep", "fp8"]

_PIECE = 1 << 22  # weights encoded at a time
_MTP_LAYER = re.compile(r"model\.mtp\.layers\.(\d+)\.")

_encode = jax.jit(mxfp4.encode)


def quantize_checkpoint(
    source: Path,
    out: Path,
    *,
    linears: Linears = "keep",
    qkv_layout: QkvLayout = "auto",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Report | None = None,
) -> None:
    """Write a BF16, F16, F32 or FP8 checkpoint again with its experts in MXFP4.

    Args:
        source: A folder in Hugging Face layout, with `dflash/`, tokenizer and other files, which are copied.
        out: The folder to make; appears when it is complete.
        linears: `keep`: only experts are quantised. `fp8`: also those linears that are FP8 in the release and plain
            here (q, k, v and dense MLPs, the multi-token-prediction layers' too).
        qkv_layout: How rows of fused qkv tensors lie, if it cannot be known from the files. `chunked` is noted in the
            index that is written.
        overwrite: Replace `out` if it is a checkpoint folder.
        shard_bytes: Size of the safetensors files.
        progress: Called with (component, bytes written so far, bytes in all).

    Raises:
        ConfigError: `config.json` is not that of a model of this family.
        CheckpointError: The checkpoint is incomplete, its experts are MXFP4 already or cannot be, a weight is not a
            finite number, `out` is in the way, or the disk has too little room.
    """
    _check_apart(source, out)
    hf = read_json_object(source / "config.json")
    config = BackboneConfig.from_hf(hf)
    files = CheckpointFolder(source)
    experts = _experts(files, config, qkv_layout)
    hf = _with_mxfp4(hf, len(config.layers))
    plain = _plain_linears(files, hf)
    metadata = {k: v for k, v in files.metadata.items() if k not in ("total_size", "format")}
    metadata["save_format"] = "mxfp4"
    if config.fused_qkv and qkv_layout == "chunked":
        metadata["tp_size"] = config.full.kv_heads
    encoded: dict[str, _Linear] = {}
    if linears == "fp8":
        rows, columns = hf["quantization_config"]["weight_block_size"]
        for name, tensor in plain.items():
            fused = name.endswith(".qkv_proj.weight")
            chunks = choose_chunks(qkv_layout, metadata, config.full.kv_heads, proven=False) if fused else 1
            encoded[name] = _Linear(tensor, chunks, (rows, columns))
    if not experts and not encoded:
        raise CheckpointError(f"{source}: there is nothing to quantise: no layer has experts")
    tensors = list(_outputs(files, experts, encoded))
    others = _other_files(source, files)

    nbytes, copied = sum(t.nbytes for t in tensors), sum(path.stat().st_size for path in others)
    check_room(out, nbytes + copied)
    with new_folder(out, overwrite) as folder:
        report = reporter(progress, "other files", copied)
        for path in others:  # first, because a file that cannot be read should be known before hours have passed
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            report(path.stat().st_size)
        report = reporter(progress, "backbone", nbytes)
        write_tensors(folder, tensors, metadata=metadata, shard_bytes=shard_bytes, progress=report)
        write_json(folder / "config.json", _ignoring(hf, plain, encoded))


@dataclass(frozen=True)
class _Linear:
    """A plain matrix that becomes FP8."""

    tensor: StoredTensor
    chunks: int
    """Parts of equal numbers of rows, in each of which the tiles of scales start afresh."""
    block: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.tensor.shape) != 2 or not self.tensor.shape[0] or self.tensor.shape[0] % self.chunks:
            raise CheckpointError(f"{self.tensor}: is no matrix whose rows can be cut into {self.chunks} chunks")

    def outputs(self) -> Iterator[OutputTensor]:
        rows, columns = self.tensor.shape
        tiles = [-(-length // size) for length, size in zip((rows // self.chunks, columns), self.block, strict=True)]
        yield OutputTensor(self.tensor.name, "F8_E4M3", (rows, columns), lambda: (v for v, _ in self._encoded()))
        scales = (self.chunks * tiles[0], tiles[1])
        yield OutputTensor(f"{self.tensor.name}_scale_inv", "F32", scales, lambda: (s for _, s in self._encoded()))

    def _encoded(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Values and scales, a strip of whole tiles at a time."""
        rows, columns = self.tensor.shape
        weight, length = StoredWeight(self.tensor, self.tensor.shape), rows // self.chunks
        strip = max(1, _PIECE // (self.block[0] * columns)) * self.block[0]
        for first in range(0, rows, length):
            for start in range(first, first + length, strip):
                values = np.empty((min(strip, first + length - start), columns), np.float32)
                weight.read_expanded(values, start, start + len(values))
                encoded, scales = encode_fp8(values, self.block)
                if not np.isfinite(scales).all():
                    raise _not_finite(self.tensor, start + int(np.argmin(np.isfinite(values).all(axis=1))))
                yield encoded, scales


def _experts(files: CheckpointFolder, config: BackboneConfig, qkv_layout: QkvLayout) -> dict[str, StoredWeight]:
    """The experts' weights by name, once the whole checkpoint is proven complete and they are proven fit."""
    claims = Claims(files.tensors, str(files.folder), config.quantization.fp8_block if config.quantization else None)
    leaves = plan_backbone(claims, config, qkv_layout, files.metadata)
    claims.prove()
    # experts, and nothing else, are stacked along more axes than the layers
    experts = {s.tensor.name: s for leaf in leaves.proven() if len(leaf.lead) > 1 for s in leaf.sources}
    if done := [name for name, weight in experts.items() if weight.format == "mxfp4"]:
        raise CheckpointError(f"{files.folder}: experts are MXFP4 already: {name_some(done, 1)}")
    for weight in experts.values():
        if weight.shape[1] % mxfp4.BLOCK:
            raise CheckpointError(f"{weight.tensor}: MXFP4 needs a multiple of {mxfp4.BLOCK} columns")
    return experts


def _with_mxfp4(hf: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A `config.json` with MXFP4 experts; what it says of FP8 stays, and is the release's where it says nothing."""
    release = quantization_config(layers, "mxfp4")
    stored = hf.get("quantization_config") or release
    return {**hf, "quantization_config": {**stored, **{k: release[k] for k in ("store_dtype", "mxfp4_block_size")}}}


def _plain_linears(files: CheckpointFolder, hf: dict[str, Any]) -> dict[str, StoredTensor]:
    """Tensors that are plain here, and FP8 in the release's layout under this `config.json`."""
    mtp_layers = len({match[1] for name in files.tensors if (match := _MTP_LAYER.match(name))})
    release = backbone_outputs(BackboneConfig.from_hf(hf), Preset(hf, None, mtp_layers), seed=0)
    names = {tensor.name for tensor in release if tensor.dtype == "F8_E4M3"}
    return {n: t for n, t in files.tensors.items() if n in names and t.dtype in FLOATS}


def _ignoring(hf: dict[str, Any], plain: Iterable[str], encoded: Container[str]) -> dict[str, Any]:
    """A `config.json` that lists the plain linears which were not encoded, where other engines look for them."""
    quantization = hf["quantization_config"]
    # the release calls all multi-token-prediction layers by the name that an engine gives to the one it runs
    modules = {name: _MTP_LAYER.sub("model.decoder.", name).removesuffix(".weight") for name in plain}
    listed = [m for m in quantization.get("ignored_layers") or [] if m not in modules.values()]
    listed += dict.fromkeys(module for name, module in modules.items() if name not in encoded)
    return {**hf, "quantization_config": {**quantization, "ignored_layers": listed}}


def _other_files(source: Path, files: CheckpointFolder) -> list[Path]:
    """What is copied: all but the weights, which are written anew, `config.json` and hidden files."""
    weights = {tensor.file.path for tensor in files.tensors.values()}
    others: list[Path] = []
    for entry in sorted(source.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            inside = (folder / name for folder, _, names in entry.walk() for name in sorted(names))
            others += [path for path in inside if path not in weights]
        elif not entry.name.startswith(".") and entry.name not in ("config.json", INDEX_NAME):
            # a model.safetensors beside an index is no part of the checkpoint, and would be in the way of its own
            others += [entry] if entry.suffix != ".safetensors" else []
    return others


def _outputs(
    files: CheckpointFolder, experts: Mapping[str, StoredWeight], linears: Mapping[str, _Linear]
) -> Iterator[OutputTensor]:
    """What is written, in the order of what is read."""
    replaced = {scale.name for weight in experts.values() for scale in weight.scales}
    for name, tensor in files.tensors.items():
        if name in experts:
            yield from _mxfp4(experts[name])
        elif name in linears:
            yield from linears[name].outputs()
        elif name not in replaced:
            yield _kept(tensor)


def _mxfp4(weight: StoredWeight) -> Iterator[OutputTensor]:
    (rows, columns), name = weight.shape, weight.tensor.name
    dtype = NUMPY_DTYPES[weight.tensor.dtype] if weight.format == "plain" else np.dtype(np.float32)
    strip = max(1, _PIECE // columns)
    found: list[np.ndarray] = []  # scales, from when the codes are made until they are written right after them

    def codes() -> Iterator[np.ndarray]:
        found.clear()
        for start in range(0, rows, strip):
            values = np.empty((min(strip, rows - start), columns), dtype)
            weight.read_expanded(values, start, start + len(values))
            encoded, scales = map(np.asarray, _encode(values))
            # The byte is the largest exponent less 2. Of finite numbers it is at most 254, of infinities and NaN 255.
            if scales.max() >= 255 - 2:
                raise _not_finite(weight.tensor, start + int(np.argmax(scales.max(axis=1))))
            found.append(scales)
            yield encoded

    def scales() -> Iterator[np.ndarray]:
        if not found:  # not asked for in this order
            for _ in codes():
                pass
        yield from found
        found.clear()

    yield OutputTensor(name, "U8", (rows, columns // 2), codes)
    yield OutputTensor(f"{name}_scale", "U8", (rows, columns // mxfp4.BLOCK), scales)


def _kept(tensor: StoredTensor) -> OutputTensor:
    def produce() -> Iterator[np.ndarray]:
        for start in range(0, tensor.nbytes, 4 * _PIECE):
            data = np.empty(min(4 * _PIECE, tensor.nbytes - start), np.uint8)
            tensor.file.pread(data, tensor.start + start)
            yield data

    return OutputTensor(tensor.name, tensor.dtype, tensor.shape, produce)


def _not_finite(tensor: StoredTensor, row: int) -> CheckpointError:
    return CheckpointError(f"{tensor.file.path}: {tensor.name}: row {row} holds a number that is not finite")


def _check_apart(source: Path, out: Path) -> None:
    one, other = source.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise CheckpointError(f"{out}: must be outside the checkpoint that is read, {source}, and not hold it")
