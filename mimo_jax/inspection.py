"""What a checkpoint folder is: sizes, dtypes, layer kinds, what will be loaded and what will be skipped."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mimo_jax.checkpoint import BackboneCheckpoint, DrafterCheckpoint
from mimo_jax.checkpoint_plan import Part, Summary
from mimo_jax.config import AttentionConfig, BackboneConfig, DrafterConfig, drafter_folder
from mimo_jax.qkv_layout import QkvLayout


def describe(folder: Path, qkv_layout: QkvLayout = "auto") -> dict[str, Any]:
    """Describe a checkpoint folder as plain values, from its configurations and headers alone.

    Raises:
        ConfigError, CheckpointError: It could not be loaded.
    """
    config = BackboneConfig.from_folder(folder)
    backbone = BackboneCheckpoint(folder, config, qkv_layout)
    result: dict[str, Any] = {
        "folder": str(folder),
        "backbone": {
            **_summary(backbone.summary),
            "layers": dict(Counter(kind.name for kind in config.layers)),
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "experts": f"{config.moe.experts}, top {config.moe.top_k}, inner size {config.moe.intermediate}",
            "full attention": _attention(config.full),
            "sliding-window attention": _attention(config.swa),
            "context": config.max_positions,
            "router": config.router_dtype,
        },
        "drafter": None,
    }
    if (own := drafter_folder(folder)) is not None:
        drafter_config = DrafterConfig.from_folder(own)
        drafter_config.check_fits(config)
        drafter = DrafterCheckpoint(own, drafter_config)
        result["drafter"] = {
            **_summary(drafter.summary),
            "layers": drafter_config.num_layers,
            "block_size": drafter_config.block_size,
            "captured layers": list(drafter_config.target_layer_ids),
            "mask token": drafter_config.mask_token_id,
            "attention": _attention(drafter_config.attention),
        }
    return result


def report(description: dict[str, Any], console: Console) -> None:
    """Print a description for people."""
    for name in ("backbone", "drafter"):
        model = description[name]
        if model is None:
            console.print("[bold]drafter[/] none: decoding will be plain")
            continue
        console.print(f"[bold]{name}[/] {model['parameters']:,} parameters, {_size(model['bytes'])}")
        table = Table("component", "tensors", "parameters", "size", "stored as", show_edge=False)
        for part in [*model["parts"], *({**p, "name": f"{p['name']} (skipped)"} for p in model["skipped"])]:
            cells = (f"{part['tensors']:,}", f"{part['parameters']:,}", _size(part["bytes"]), ", ".join(part["dtypes"]))
            table.add_row(part["name"], *cells)
        console.print(table)
        for key, value in model.items():
            if key not in ("parameters", "bytes", "parts", "skipped"):
                shown = ", ".join(f"{v} {k}" for k, v in value.items()) if isinstance(value, dict) else value
                console.print(f"  {key}: {shown}", highlight=False, soft_wrap=True)
        console.print()


def _summary(summary: Summary) -> dict[str, Any]:
    return {
        "parameters": summary.parameters,
        "bytes": summary.nbytes,
        "parts": [_part(p) for p in summary.parts],
        "skipped": [_part(p) for p in summary.skipped],
    }


def _part(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "tensors": part.tensors,
        "parameters": part.parameters,
        "bytes": part.nbytes,
        "dtypes": list(part.dtypes),
    }


def _attention(config: AttentionConfig) -> str:
    seen = "all keys" if config.visible_keys is None else f"{config.visible_keys} keys"
    return (
        f"{config.heads} heads, {config.kv_heads} KV heads, head size {config.qk_dim}/{config.v_dim}, "
        f"rotary {config.rotary_dim} at base {config.rope_theta:g}, sees {seen}"
        f"{', with sinks' if config.sink else ''}"
    )


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000  # pyright: ignore[reportAssignmentType]
    return f"{count:.4g} TB"
