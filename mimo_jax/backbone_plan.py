"""Which tensors of a checkpoint fill which parameters of the backbone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_jax.checkpoint_plan import Claims, Leaves, Matrix
from mimo_jax.config import AttentionConfig, BackboneConfig, LayerKind
from mimo_jax.qkv_layout import QkvLayout, choose_chunks, fused_rows, fused_scale_rows, plain_rows, split_rows
from mimo_jax.safetensors_reader import CheckpointError
from mimo_jax.stored_weights import StoredWeight
from pallas_kernels.fp8 import COLUMNS as FP8_COLUMNS


def plan_backbone(claims: Claims, config: BackboneConfig, qkv_layout: QkvLayout, metadata: Mapping[str, Any]) -> Leaves:
    """Claim every tensor of the backbone.

    Args:
        claims: The checkpoint's tensors; what is missing or does not fit is noted there.
        config: Its `config.json`.
        qkv_layout: How rows of fused qkv tensors lie, if it cannot be known.
        metadata: Of the checkpoint's index.
    """
    leaves = Leaves()
    vocabulary = (config.vocab_size, config.hidden_size)
    leaves.add(("embedding",), (), claims.plain("embedding", "model.embed_tokens.weight", vocabulary))
    attention = _AttentionPlan(claims, config)
    for kind in config.kinds:
        _claim_layers(claims, leaves, attention, config, kind)
    leaves.add(("final_norm",), (), claims.vector("norms", "model.norm.weight", config.hidden_size))
    leaves.add(("lm_head",), (), claims.plain("lm_head", "lm_head.weight", vocabulary))
    attention.finish(leaves, qkv_layout, metadata)
    return leaves


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

    def finish(self, leaves: Leaves, asked: QkvLayout, metadata: Mapping[str, Any]) -> None:
        """Add the leaves of q, k and v, in canonical order of heads."""
        chunks = self._chunks(asked, metadata) if self._config.fused_qkv else 0
        if chunks is None:
            return
        for kind, found in self._found:
            if all(matrix is not None for matrix in found):
                weights = self._fused(kind, found[0], chunks) if chunks else self._split(kind, found)
                attention, lead = self._config.attention(kind.attention), (len(self._config.layers_of(kind)),)
                head_rows = (0, attention.qk_dim, attention.v_dim)
                for name, weight, rows in zip("qkv", weights, head_rows, strict=False):
                    leaves.add(("layers", kind.name, "attention", name), lead, weight, head_rows=rows)

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
    claims: Claims, leaves: Leaves, attention: _AttentionPlan, config: BackboneConfig, kind: LayerKind
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
