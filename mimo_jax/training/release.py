"""Trained parameters as a checkpoint folder in the release's layout.

A backbone is first written plain, in bfloat16, then quantised as any checkpoint is: what training with fake
quantisation has rounded already comes through unchanged.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.backbone_plan import plan_backbone
from mimo_jax.checkpoint_plan import Claims, Leaves
from mimo_jax.config import BackboneConfig, DrafterConfig
from mimo_jax.drafter_plan import plan_drafter
from mimo_jax.export import OutputTensor, new_folder, write_json, write_tensors
from mimo_jax.params import Params
from mimo_jax.presets import Preset
from mimo_jax.quantize import quantize_checkpoint
from mimo_jax.safetensors_reader import NUMPY_DTYPES, StoredTensor
from mimo_jax.synthesize import backbone_outputs, drafter_outputs
from mimo_jax.torch_sidecar import write_mask_embedding

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def write_plain(out: Path, hf: dict[str, Any], params: Params, tokenizer: Path, *, overwrite: bool = False) -> None:
    """Write a backbone in bfloat16.

    Args:
        out: The folder to make.
        hf: Its `config.json`; what it says of quantisation is left out.
        params: Plain float32 parameters.
        tokenizer: A folder whose tokenizer files are copied.
        overwrite: Replace `out` if it is a checkpoint folder.
    """
    hf = {k: v for k, v in hf.items() if k != "quantization_config"}
    config = BackboneConfig.from_hf(hf)
    names = list(backbone_outputs(config, Preset(hf, None, 0), seed=0))
    metadata = {"tp_size": config.full.kv_heads} if config.fused_qkv else {}
    claims = _stand_ins(names)
    leaves = plan_backbone(claims, config, "auto", metadata)
    claims.prove()
    with new_folder(out, overwrite) as folder:
        write_tensors(folder, _filled(names, leaves, params), metadata=metadata)
        write_json(folder / "config.json", hf)
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, folder / name)


def write_release(out: Path, hf: dict[str, Any], params: Params, tokenizer: Path, *, overwrite: bool = False) -> None:
    """Write a backbone with MXFP4 experts and FP8 linears; arguments as for `write_plain`."""
    with tempfile.TemporaryDirectory(prefix="mimo-jax-") as scratch:
        plain = Path(scratch) / "plain"
        write_plain(plain, hf, params, tokenizer)
        quantize_checkpoint(plain, out, linears="fp8", overwrite=overwrite)


def write_drafter(out: Path, hf: dict[str, Any], params: Params, *, overwrite: bool = False) -> None:
    """Write a drafter in bfloat16, its mask vector beside it as `mask_embedding.pt`.

    Args:
        out: The folder to make, usually `dflash` in its backbone's.
        hf: Its `config.json`.
        params: Plain float32 parameters.
        overwrite: Replace `out` if it is a checkpoint folder.
    """
    config = DrafterConfig.from_hf(hf)
    names = list(drafter_outputs(config, seed=0))
    claims = _stand_ins(names)
    leaves = plan_drafter(claims, config)
    claims.prove()
    with new_folder(out, overwrite) as folder:
        write_tensors(folder, _filled(names, leaves, params), prefix="dflash_draft_model")
        write_json(folder / "config.json", hf)
        mask = np.asarray(params["mask_embedding"]).astype(ml_dtypes.bfloat16)
        write_mask_embedding(folder / "mask_embedding.pt", config.mask_token_id, mask)


def _stand_ins(names: Iterable[OutputTensor]) -> Claims:
    """Claims on tensors that are yet to be written: the reader's plan, run to learn what goes where."""
    file: Any = None  # nothing is read
    return Claims({t.name: StoredTensor(t.name, t.dtype, t.shape, file, 0, t.nbytes) for t in names}, "export", None)


def _filled(names: Iterable[OutputTensor], leaves: Leaves, params: Params) -> list[OutputTensor]:
    """The tensors with the parameters' values, each made when it is written."""
    parts: dict[str, list[tuple[Any, np.ndarray]]] = {}
    for leaf in leaves.proven():
        value: Any = params
        for key in leaf.path:
            value = value[key]
        stacked = np.asarray(value).reshape(-1, *leaf.sources[0].shape)
        for source, weight in zip(leaf.sources, stacked, strict=True):
            rows = slice(None) if source.rows is None else source.rows.stored
            parts.setdefault(source.tensor.name, []).append((rows, weight))

    def filled(tensor: OutputTensor) -> OutputTensor:
        def produce() -> Iterator[np.ndarray]:
            values = np.empty(tensor.shape, NUMPY_DTYPES[tensor.dtype])
            for rows, weight in parts[tensor.name]:
                values[rows] = weight.astype(values.dtype)
            yield values

        return OutputTensor(tensor.name, tensor.dtype, tensor.shape, produce)

    return [filled(tensor) for tensor in names]
