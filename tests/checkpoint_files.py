"""Checkpoint folders for tests: the smallest synthetic one, and edits of any."""

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.backbone import Backbone
from mimo_jax.config import BackboneConfig, DrafterConfig
from mimo_jax.drafter import Drafter
from mimo_jax.export import OutputTensor, write_json, write_tensors
from mimo_jax.params import Declared, Params
from mimo_jax.presets import PRESETS, Preset

MICRO = Preset(
    PRESETS["tiny"].backbone
    | {
        "vocab_size": 272,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "hybrid_layer_pattern": [0, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "num_attention_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "head_dim": 24,
        "swa_head_dim": 24,
        "v_head_dim": 16,
        "swa_v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "sliding_window": 8,
        "sliding_window_size": 8,
    },
    (PRESETS["tiny"].drafter or {})
    | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_target_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 16,
        "v_head_dim": 16,
        "intermediate_size": 96,
        "sliding_window": 8,
        "dflash_config": {
            "target_layer_ids": [0, 2],
            "mask_token_id": 265,
            "block_size": 8,
            "use_swa": True,
            "swa_window_size": 8,
            "attention_value_scale": 0.707,
            "attention_sink_bias": True,
        },
    },
    mtp_layers=1,
)
"""As small as a checkpoint with everything in it can be: some 200 kB."""


@dataclass(frozen=True)
class Tensor:
    """A stored tensor as plain bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self, dtype: Any) -> np.ndarray:
        """The bytes as an array."""
        return np.frombuffer(self.data, dtype).reshape(self.shape)

    @classmethod
    def of(cls, dtype: str, array: np.ndarray) -> "Tensor":
        """An array's bytes under the name that safetensors has for its dtype."""
        return cls(dtype, array.shape, np.ascontiguousarray(array).tobytes())


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by an own few lines rather than the reader under test."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(index["weight_map"].values()):
        raw = (folder / name).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for key, entry in json.loads(raw[8 : 8 + length]).items():
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                data = raw[8 + length + start : 8 + length + end]
                tensors[key] = Tensor(entry["dtype"], tuple(entry["shape"]), data)
    return tensors


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None
) -> Path:
    """A folder with these tensors in one file."""
    folder.mkdir(parents=True, exist_ok=True)

    def producer(data: bytes) -> Callable[[], Iterable[np.ndarray]]:
        return lambda: [np.frombuffer(data, np.uint8)]

    outputs = [OutputTensor(n, t.dtype, t.shape, producer(t.data)) for n, t in tensors.items()]
    write_tensors(folder, outputs, metadata=metadata)
    write_json(folder / "config.json", config)
    return folder


def edit(tensors: dict[str, Tensor], name: str, **changes: Any) -> dict[str, Tensor]:
    """A copy in which one tensor is changed."""
    return tensors | {name: replace(tensors[name], **changes)}


def declared_backbone(config: BackboneConfig, dtype: str = "float32") -> Declared[Backbone]:
    """The module that a backbone's parameters fill."""
    return Declared(lambda: Backbone(config, dtype))


def declared_drafter(config: DrafterConfig, dtype: str = "float32") -> Declared[Drafter]:
    """The module that a drafter's parameters fill."""
    return Declared(lambda: Drafter(config, dtype))


def assert_same(one: Params, other: Params) -> None:
    """Both trees are equal, bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8), err_msg=str(path))
