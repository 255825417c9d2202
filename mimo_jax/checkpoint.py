"""Checkpoints of backbone and drafter: proven complete when opened, read when loaded.

checkpoint = BackboneCheckpoint(folder, config)
params = checkpoint.load(declared)
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mimo_jax.checkpoint_plan import FLOATS, Claims, Matrix, Summary
from mimo_jax.config import AttentionConfig, BackboneConfig, DrafterConfig, LayerKind
from mimo_jax.params import Declared, Params
from mimo_jax.qkv_layout import QkvLayout, choose_chunks, fused_rows, fused_scale_rows, plain_rows, split_rows
from mimo_jax.quantization import FP8_COLUMNS
from mimo_jax.safetensors_reader import (
    CheckpointError,
    CheckpointFolder,
    SafetensorsFile,
    StoredTensor,
    name_some,
    shorten,
)
from mimo_jax.stored_weights import Leaf, Placer, Progress, Sharding, StoredWeight
from mimo_jax.torch_sidecar import read_mask_embedding

logger = logging.getLogger(__name__)

Storage = Literal["packed", "expanded"]

_MASK_NAMES = ("mask_embedding", "mask_embedding.weight")


class _Leaves:
    """Gathers the stored weights of every leaf."""

    def __init__(self) -> None:
        self._lead: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._sources: dict[tuple[str, ...], list[StoredWeight | None]] = {}

    def add(self, path: tuple[str, ...], lead: tuple[int, ...], *sources: StoredWeight | None) -> None:
        self._lead[path] = lead
        self._sources.setdefault(path, []).extend(sources)

    def proven(self) -> list[Leaf]:
        """The leaves, once it is proven that none of their sources is missing."""
        return [Leaf(p, self._lead[p], [s for s in found if s]) for p, found in self._sources.items()]


class _Checkpoint:
    """Leaves and a summary, and how to load them."""

    def __init__(self, where: Path, leaves: list[Leaf], summary: Summary, vectors: Mapping[str, np.ndarray]):
        self.where, self.summary = where, summary
        self._leaves, self._vectors = leaves, vectors

    @property
    def total_bytes(self) -> int:
        """What loading all of it on one device reports to `progress`."""
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
            progress: Told of bytes as they are read; on one device they add up to `total_bytes`.
            readers: Threads that read and decode; default: the number of CPUs, at most 8.

        Raises:
            CheckpointError: The formats cannot be kept packed (before any data is read), a file has become
                shorter, or a scale is no number.
        """
        shapes, axes = _flatten(declared.shapes), _flatten(declared.axes)
        offered = {leaf.path: leaf.shape for leaf in self._leaves} | {(k,): v.shape for k, v in self._vectors.items()}
        if offered != {path: s.shape for path, s in shapes.items()}:
            raise ValueError(f"{self.where}: the declared module was made from another configuration")
        packed = self._choose_packed() if storage == "packed" else set()
        params: Params = {}
        with Placer(sharding, progress, readers or min(8, os.cpu_count() or 1)) as placer:
            for leaf in self._leaves:
                node = params
                for key in leaf.path[:-1]:
                    node = node.setdefault(key, {})
                dtype = np.dtype(shapes[leaf.path].dtype)
                node[leaf.path[-1]] = leaf.load(dtype, leaf.path in packed, placer, axes[leaf.path])
            for key, vector in self._vectors.items():
                params[key] = placer.put(vector.astype(shapes[(key,)].dtype), axes[(key,)])
        return params

    def _choose_packed(self) -> set[tuple[str, ...]]:
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
        leaves = _Leaves()
        vocabulary = (config.vocab_size, config.hidden_size)
        leaves.add(("embedding",), (), claims.plain("embedding", "model.embed_tokens.weight", vocabulary))
        attention = _AttentionPlan(claims, config)
        for kind in config.kinds:
            _claim_layers(claims, leaves, attention, config, kind)
        leaves.add(("final_norm",), (), claims.vector("norms", "model.norm.weight", config.hidden_size))
        leaves.add(("lm_head",), (), claims.plain("lm_head", "lm_head.weight", vocabulary))
        attention.finish(leaves, qkv_layout, files.metadata)
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
        leaves = _Leaves()
        hidden, inner, attention = config.hidden_size, config.intermediate, config.attention
        q_rows, o_columns = attention.heads * attention.qk_dim, attention.heads * attention.v_dim
        features = (hidden, len(config.target_layer_ids) * hidden)
        leaves.add(("fc",), (), claims.plain("feature projection", "fc.weight", features))
        leaves.add(("hidden_norm",), (), claims.vector("norms", "hidden_norm.weight", hidden))
        leaves.add(("final_norm",), (), claims.vector("norms", "norm.weight", hidden))
        for i in range(config.num_layers):
            prefix, lead = f"layers.{i}.", (config.num_layers,)
            for path, name, length in (
                (("attention_norm",), "input_layernorm.weight", hidden),
                (("mlp_norm",), "post_attention_layernorm.weight", hidden),
                (("q_norm",), "self_attn.q_norm.weight", attention.qk_dim),
                (("k_norm",), "self_attn.k_norm.weight", attention.qk_dim),
            ):
                leaves.add(path, lead, claims.vector("norms", prefix + name, length))
            for path, part, name, shape in (
                (("attention", "q"), "attention", "self_attn.q_proj", (q_rows, hidden)),
                (("attention", "k"), "attention", "self_attn.k_proj", (attention.kv_heads * attention.qk_dim, hidden)),
                (("attention", "v"), "attention", "self_attn.v_proj", (attention.kv_heads * attention.v_dim, hidden)),
                (("attention", "o"), "attention", "self_attn.o_proj", (hidden, o_columns)),
                (("gate",), "mlp", "mlp.gate_proj", (inner, hidden)),
                (("up",), "mlp", "mlp.up_proj", (inner, hidden)),
                (("down",), "mlp", "mlp.down_proj", (hidden, inner)),
            ):
                leaves.add(path, lead, claims.plain(part, f"{prefix}{name}.weight", shape))
            if attention.sink:
                sink = claims.vector("attention", prefix + "self_attn.attention_sink_bias", attention.heads)
                leaves.add(("attention", "sink"), lead, sink)
        mask = _mask_vector(folder, claims, tensors, config)
        summary = claims.prove()
        super().__init__(folder, leaves.proven(), summary, {"mask_embedding": mask})


class _AttentionPlan:
    """Claims the projections of every layer; only all of them together tell how fused rows lie."""

    def __init__(self, claims: Claims, config: BackboneConfig):
        self._claims, self._config = claims, config
        self._found: list[tuple[LayerKind, list[Matrix | None]]] = []
        self._row_block, self._scale_columns = claims.fp8_block or (FP8_COLUMNS, FP8_COLUMNS)

    def claim(self, layer: int, kind: LayerKind) -> None:
        """Claim q, k and v of a layer, fused or apart as the configuration says."""
        names = ("qkv",) if self._config.fused_qkv else ("q", "k", "v")
        rows = _projection_rows(self._config.attention(kind.attention))
        found = [
            self._claims.matrix(
                "attention",
                f"model.layers.{layer}.self_attn.{name}_proj.weight",
                (sum(rows) if name == "qkv" else rows["qkv".index(name)], self._config.hidden_size),
            )
            for name in names
        ]
        self._found.append((kind, found))

    def finish(self, leaves: _Leaves, asked: QkvLayout, metadata: Mapping[str, Any]) -> None:
        """Add the leaves of q, k and v, in canonical order of heads."""
        chunks = self._chunks(asked, metadata) if self._config.fused_qkv else 0
        if chunks is None:
            return
        for kind, found in self._found:
            if all(matrix is not None for matrix in found):
                weights = self._fused(kind, found[0], chunks) if chunks else self._split(kind, found)
                for name, weight in zip("qkv", weights, strict=False):
                    leaves.add(("layers", kind.name, "attention", name), (len(self._config.layers_of(kind)),), weight)

    def _chunks(self, asked: QkvLayout, metadata: Mapping[str, Any]) -> int | None:
        kv_heads, proven = self._config.full.kv_heads, False
        uneven = {
            a.kv_heads for a in (self._config.full, self._config.swa) if a.kv_heads % kv_heads or a.heads % kv_heads
        }
        for kind, (matrix,) in self._found:
            if matrix and matrix.scale and matrix.format == "fp8" and not uneven:
                attention = self._config.attention(kind.attention)
                per_chunk, single = fused_scale_rows(attention, kv_heads, self._row_block)
                proven |= matrix.scale.shape[0] == per_chunk != single
        try:
            chunks = choose_chunks(asked, metadata, kv_heads, proven)
        except CheckpointError as error:
            self._claims.wrong(str(error))
            return None
        if chunks > 1 and uneven:
            self._claims.wrong(
                f"fused qkv rows in num_key_value_heads ({kv_heads}) chunks need multiples of that many heads in every "
                f"layer; swa_num_key_value_heads is {self._config.swa.kv_heads}"
            )
            return None
        return chunks

    def _fused(self, kind: LayerKind, matrix: Matrix | None, chunks: int) -> list[StoredWeight]:
        assert matrix is not None
        attention, per_chunk = self._config.attention(kind.attention), False
        if matrix.format == "fp8":
            assert matrix.scale is not None
            allowed = fused_scale_rows(attention, chunks, self._row_block)
            if not self._claims.scale_rows(matrix, *allowed):
                return []
            per_chunk = matrix.scale.shape[0] == allowed[0]
        maps = fused_rows(attention, chunks, self._row_block, per_chunk)
        hidden = matrix.shape[1]
        return [matrix.weight(m, (len(m.stored), hidden), self._scale_columns) for m in maps]

    def _split(self, kind: LayerKind, found: Sequence[Matrix | None]) -> list[StoredWeight]:
        matrices = [m for m in found if m]
        attention, block = self._config.attention(kind.attention), self._row_block
        scales = [m.scale for m in matrices if m.format == "fp8" and m.scale]
        if len(scales) < 3:  # scales shared among the three need all three
            for matrix in matrices:
                if matrix.format == "fp8" and not self._claims.scale_rows(matrix, math.ceil(matrix.shape[0] / block)):
                    return []
            return [m.weight(plain_rows(m.shape[0], block), m.shape, self._scale_columns) for m in matrices]
        q, k, v = (scale.shape[0] for scale in scales)
        # Chunks were those of the full-attention heads in layers of both kinds; other exports may use the layer's own.
        counts = dict.fromkeys((self._config.full.kv_heads, attention.kv_heads))
        possible = [c for c in counts if attention.kv_heads % c == attention.heads % c == 0]
        fitting = next((f for c in possible if (f := split_rows(attention, c, block, (q, k, v)))), None)
        if fitting is None:
            names = ", ".join(map(str, scales))
            self._claims.wrong(f"{names}: these numbers of rows fit neither plain tiles nor tiles of [q|k|v] chunks")
            return []
        maps, shared = fitting
        more = scales if shared else ()
        return [m.weight(r, m.shape, self._scale_columns, *more) for m, r in zip(matrices, maps, strict=True)]


def _claim_layers(
    claims: Claims, leaves: _Leaves, attention: _AttentionPlan, config: BackboneConfig, kind: LayerKind
) -> None:
    """Claim the layers of one kind; their q, k and v come later."""
    layers, sizes, hidden = config.layers_of(kind), config.attention(kind.attention), config.hidden_size
    lead, where = (len(layers),), ("layers", kind.name)
    experts, inner = config.moe.experts, config.moe.intermediate
    router = (experts, hidden)
    for i in layers:
        prefix = f"model.layers.{i}."
        leaves.add((*where, "attention_norm"), lead, claims.vector("norms", f"{prefix}input_layernorm.weight", hidden))
        attention.claim(i, kind)
        output = claims.linear("attention", f"{prefix}self_attn.o_proj.weight", (hidden, sizes.heads * sizes.v_dim))
        leaves.add((*where, "attention", "o"), lead, output)
        if sizes.sink:
            sink = claims.vector("attention", f"{prefix}self_attn.attention_sink_bias", sizes.heads)
            leaves.add((*where, "attention", "sink"), lead, sink)
        norm = claims.vector("norms", f"{prefix}post_attention_layernorm.weight", hidden)
        leaves.add((*where, "mlp_norm"), lead, norm)
        if kind.mlp == "dense":
            for name, shape in (
                ("gate", (config.dense_intermediate, hidden)),
                ("up", (config.dense_intermediate, hidden)),
                ("down", (hidden, config.dense_intermediate)),
            ):
                weight = claims.linear("dense mlp", f"{prefix}mlp.{name}_proj.weight", shape)
                leaves.add((*where, "mlp", name), lead, weight)
            continue
        gate = claims.plain("router", f"{prefix}mlp.gate.weight", router, ("F32", "BF16"))
        leaves.add((*where, "mlp", "router"), lead, gate)
        bias = claims.vector("router", f"{prefix}mlp.gate.e_score_correction_bias", experts, ("F32",))
        leaves.add((*where, "mlp", "correction_bias"), lead, bias)
        for e in range(experts):
            expert = f"{prefix}mlp.experts.{e}."
            gate_up = [claims.linear("experts", f"{expert}{n}_proj.weight", (inner, hidden)) for n in ("gate", "up")]
            leaves.add((*where, "mlp", "gate_up"), (*lead, experts, 2), *gate_up)
            down = claims.linear("experts", f"{expert}down_proj.weight", (hidden, inner))
            leaves.add((*where, "mlp", "down"), (*lead, experts), down)


def _projection_rows(attention: AttentionConfig) -> tuple[int, int, int]:
    return (
        attention.heads * attention.qk_dim,
        attention.kv_heads * attention.qk_dim,
        attention.kv_heads * attention.v_dim,
    )


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
