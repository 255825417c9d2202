"""Synthetic checkpoints: the release's layout, the same bytes from the same seed, and parameters that load."""

import json
import math
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from mimo_jax.checkpoint import BackboneCheckpoint, DrafterCheckpoint
from mimo_jax.config import BackboneConfig, ConfigError, DrafterConfig
from mimo_jax.presets import PRESETS, Preset
from mimo_jax.quantization import FP8BlockWeight, MXFP4Weight, dequantize
from mimo_jax.safetensors_reader import CheckpointError
from mimo_jax.synthesize import backbone_outputs, drafter_outputs, synthesize
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.torch_sidecar import read_mask_embedding
from tests.checkpoint_files import MICRO, assert_same, declared_backbone, declared_drafter, read_tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "tiny"
    synthesize("tiny", folder, seed=1)
    return folder


def outputs(name):
    """What would be written, by name; nothing is made."""
    preset = PRESETS[name]
    backbone = {t.name: t for t in backbone_outputs(BackboneConfig.from_hf(preset.backbone), preset, 0)}
    drafter = {}
    if preset.drafter is not None:
        drafter = {t.name: t for t in drafter_outputs(DrafterConfig.from_hf(preset.drafter), 0)}
    return backbone, drafter


def test_the_release_tensor_by_tensor():
    backbone, drafter = outputs("mimo-v2.5-pro")
    expected = {
        "model.embed_tokens.weight": ("BF16", (152576, 6144)),
        "lm_head.weight": ("BF16", (152576, 6144)),
        "model.norm.weight": ("BF16", (6144,)),
        "model.layers.0.input_layernorm.weight": ("BF16", (6144,)),
        "model.layers.69.self_attn.qkv_proj.weight": ("F8_E4M3", (27136, 6144)),
        "model.layers.69.self_attn.qkv_proj.weight_scale_inv": ("F32", (216, 48)),
        "model.layers.1.self_attn.o_proj.weight": ("BF16", (6144, 16384)),
        "model.layers.1.self_attn.attention_sink_bias": ("BF16", (128,)),
        "model.layers.0.mlp.gate_proj.weight": ("F8_E4M3", (16384, 6144)),
        "model.layers.0.mlp.gate_proj.weight_scale_inv": ("F32", (128, 48)),
        "model.layers.0.mlp.down_proj.weight_scale_inv": ("F32", (48, 128)),
        "model.layers.1.mlp.gate.weight": ("F32", (384, 6144)),
        "model.layers.1.mlp.gate.e_score_correction_bias": ("F32", (384,)),
        "model.layers.69.mlp.experts.383.gate_proj.weight": ("U8", (2048, 3072)),
        "model.layers.69.mlp.experts.383.gate_proj.weight_scale": ("U8", (2048, 192)),
        "model.layers.69.mlp.experts.383.down_proj.weight": ("U8", (6144, 1024)),
        "model.layers.69.mlp.experts.383.down_proj.weight_scale": ("U8", (6144, 64)),
        "model.mtp.layers.2.eh_proj.weight": ("BF16", (6144, 12288)),
        "model.mtp.layers.2.self_attn.qkv_proj.weight_scale_inv": ("F32", (216, 48)),
        "model.mtp.layers.0.mlp.up_proj.weight": ("F8_E4M3", (16384, 6144)),
    }
    for name, (dtype, shape) in expected.items():
        assert (backbone[name].dtype, backbone[name].shape) == (dtype, shape), name
    assert sum("attention_sink_bias" in n and ".mtp." not in n for n in backbone) == 60
    # The whole file to the byte: what the hub shows is 554,344,371,072 elements and 569.8 GB with the drafter.
    assert sum(math.prod(t.shape) for t in backbone.values()) == 554_344_371_072
    assert sum(t.nbytes for t in backbone.values()) == 564_286_050_048
    assert len(drafter) == 63
    assert sum(math.prod(t.shape) for t in drafter.values()) == 2_768_316_288
    assert sum(t.nbytes for t in drafter.values()) == 5_536_632_576


def test_the_others_tensor_by_tensor():
    flash, _ = outputs("mimo-v2-flash")
    for name, shape in (("q", (96, 32)), ("k", (8, 32)), ("v", (4, 32))):
        assert flash[f"model.layers.0.self_attn.{name}_proj.weight_scale_inv"].shape == shape
    for name, shape in (("q", (96, 32)), ("k", (12, 32)), ("v", (8, 32))):
        assert flash[f"model.layers.1.self_attn.{name}_proj.weight_scale_inv"].shape == shape
    assert flash["model.layers.1.mlp.experts.0.down_proj.weight"].dtype == "F8_E4M3"
    v25, drafter = outputs("mimo-v2.5")
    assert v25["model.layers.0.self_attn.qkv_proj.weight_scale_inv"].shape == (108, 32)
    assert v25["model.layers.1.self_attn.qkv_proj.weight"].shape == (14848, 4096)
    assert v25["model.layers.1.self_attn.qkv_proj.weight_scale_inv"].shape == (116, 32)
    assert any(name.startswith("visual.") for name in v25)
    assert any(name.startswith("audio_encoder.") for name in v25)
    assert sum(t.nbytes for t in drafter.values()) == 2_936_114_304
    assert outputs("mimo-v2.6-pro")[0]["model.layers.1.mlp.gate.weight"].dtype == "BF16"


@pytest.mark.parametrize("name", ["tiny", "small", "mimo-v2.6-pro"])
def test_every_part_has_its_format(name):
    backbone, drafter = outputs(name)
    dtypes = {}
    for tensor in backbone.values():
        dtypes.setdefault(tensor.name.rsplit(".", 2)[-2] + "." + tensor.name.rsplit(".", 1)[-1], set()).add(
            tensor.dtype
        )
    assert dtypes["qkv_proj.weight"] == {"F8_E4M3"}
    assert dtypes["o_proj.weight"] == {"BF16"}
    assert dtypes["gate.e_score_correction_bias"] == {"F32"}
    assert {t.dtype for n, t in backbone.items() if ".experts." in n} == {"U8"}
    assert {t.dtype for t in drafter.values()} == {"BF16"}


def test_files(tiny):
    assert sorted(p.name for p in tiny.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "dflash",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(p.name for p in (tiny / "dflash").iterdir()) == [
        "config.json",
        "dflash_draft_model-00001-of-00001.safetensors",
        "mask_embedding.pt",
        "model.safetensors.index.json",
    ]
    metadata = json.loads((tiny / "model.safetensors.index.json").read_text())["metadata"]
    assert (metadata["save_format"], metadata["tp_size"]) == ("mxfp4", 2)
    assert sum(p.stat().st_size for p in tiny.rglob("*") if p.is_file()) < 16 << 20


def test_tokenizer_fits_the_model(tiny):
    config, tokenizer = BackboneConfig.from_folder(tiny), Tokenizer.from_folder(tiny)
    drafter = DrafterConfig.from_folder(tiny / "dflash")
    assert tokenizer.vocab_size <= config.vocab_size
    assert tokenizer.token_id("<|mask|>") == drafter.mask_token_id
    text = "Grüße, 世界! 12 <think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_same_seed_same_bytes(tmp_path, tiny):
    synthesize("tiny", tmp_path / "again", seed=1)
    synthesize("tiny", tmp_path / "other", seed=2)
    for path in sorted(tiny.rglob("*")):
        if path.is_file():
            name = path.relative_to(tiny)
            assert path.read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    one, other = read_tensors(tiny), read_tensors(tmp_path / "other")
    assert all(one[name].data != other[name].data for name in one)


def test_shards_change_nothing(tmp_path, tiny):
    synthesize("tiny", tmp_path / "x", seed=1, shard_bytes=1_000_000)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 5
    assert read_tensors(tmp_path / "x") == read_tensors(tiny)
    config = BackboneConfig.from_folder(tiny)
    loaded = [BackboneCheckpoint(f, config).load(declared_backbone(config)) for f in (tiny, tmp_path / "x")]
    assert_same(*loaded)


def test_mtp_values_are_others(tiny):
    tensors = read_tensors(tiny)
    assert {n for n in tensors if n.startswith("model.mtp.")} >= {
        "model.mtp.layers.0.self_attn.qkv_proj.weight",
        "model.mtp.layers.0.mlp.down_proj.weight_scale_inv",
    }
    one, other = "model.mtp.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    assert tensors[one].data != tensors[other].data


def test_values_are_sane(tiny):
    """Weights keep the size of what they multiply, and every expert is another."""
    config = BackboneConfig.from_folder(tiny)
    params = BackboneCheckpoint(tiny, config).load(declared_backbone(config))

    def spread(weight):
        values = np.asarray(dequantize(weight, "float32"))
        assert np.isfinite(values).all()
        return values.std() * math.sqrt(values.shape[-1])

    is_weight = (MXFP4Weight, FP8BlockWeight)
    for path, weight in jax.tree.leaves_with_path(params["layers"], is_leaf=lambda w: isinstance(w, is_weight)):
        name = path[-1].key
        if name in ("q", "k", "v", "o", "gate", "up", "down", "gate_up", "router"):
            assert 0.6 < spread(weight) < 1.9, path
    assert abs(np.asarray(params["embedding"]).std() - 1) < 0.05
    codes = np.asarray(params["layers"]["swa_moe"]["mlp"]["down"].codes)
    assert len({codes[i, e].tobytes() for i in range(codes.shape[0]) for e in range(codes.shape[1])}) == 4 * 16
    mask = DrafterConfig.from_folder(tiny / "dflash").mask_token_id
    norms = np.linalg.norm(np.asarray(params["embedding"]), axis=1)
    assert norms[mask] < 1e-3 < 10 < np.delete(norms, mask).min()


def test_drafter_loads(tiny):
    config = DrafterConfig.from_folder(tiny / "dflash")
    params = DrafterCheckpoint(tiny / "dflash", config).load(declared_drafter(config, "bfloat16"))
    token, vector = read_mask_embedding(tiny / "dflash" / "mask_embedding.pt", config.hidden_size)
    assert token == config.mask_token_id
    np.testing.assert_array_equal(np.asarray(params["mask_embedding"]), vector)
    assert vector.dtype == ml_dtypes.bfloat16


def test_progress(tmp_path):
    told = []
    synthesize(MICRO, tmp_path / "x", progress=lambda *report: told.append(report))
    for component, folder in (("backbone", tmp_path / "x"), ("drafter", tmp_path / "x" / "dflash")):
        last = [report for report in told if report[0] == component][-1]
        assert last[1] == last[2] == sum(len(t.data) for t in read_tensors(folder).values())


def test_without_a_drafter(tmp_path):
    synthesize(Preset(MICRO.backbone, None, 0), tmp_path / "x")
    assert not (tmp_path / "x" / "dflash").exists()


def test_refusals(tmp_path, monkeypatch):
    out = tmp_path / "x"
    with pytest.raises(CheckpointError, match="no preset 'huge'; there are mimo-v2-flash"):
        synthesize("huge", out)
    with pytest.raises(ConfigError, match="vocab_size is 200"):
        synthesize(Preset(MICRO.backbone | {"vocab_size": 200}, None, 0), out)
    with pytest.raises(ConfigError, match="does not fit"):
        synthesize(Preset(MICRO.backbone, PRESETS["tiny"].drafter, 0), out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(CheckpointError, match="the disk has 100,000 free"):
        synthesize(MICRO, out)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    synthesize(MICRO, out)
    with pytest.raises(CheckpointError, match="already exists"):
        synthesize(MICRO, out)
    synthesize(MICRO, out, overwrite=True)
