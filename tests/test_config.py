"""Configurations: every field, every fallback, and an error that names the key for everything else."""

import json
import logging
import re

import pytest

from mimo_jax.config import BackboneConfig, ConfigError, DrafterConfig, LayerKind
from mimo_jax.hf_keys import read_json_object
from mimo_jax.presets import PRESETS
from tests.conftest import golden_roots

PRO = PRESETS["mimo-v2.5-pro"]
DRAFTER = PRO.drafter or {}
DFLASH = DRAFTER["dflash_config"]


def backbone(**changes):
    """The release's configuration with keys changed; `...` takes a key out."""
    values = PRO.backbone | changes
    return BackboneConfig.from_hf({k: v for k, v in values.items() if v is not ...})


def drafter(changes=None, **dflash):
    values = DRAFTER | {"dflash_config": DFLASH | dflash} | (changes or {})
    values["dflash_config"] = {k: v for k, v in values["dflash_config"].items() if v is not ...}
    return DrafterConfig.from_hf({k: v for k, v in values.items() if v is not ...})


def test_the_release():
    config = backbone()
    assert (config.vocab_size, config.hidden_size, len(config.layers)) == (152576, 6144, 70)
    full = [i for i, kind in enumerate(config.layers) if kind.attention == "full"]
    assert full == [0, 7, 15, 23, 31, 39, 47, 55, 62, 69]
    assert config.kinds == (LayerKind("full", "dense"), LayerKind("swa", "moe"), LayerKind("full", "moe"))
    for attention in (config.full, config.swa):
        assert (attention.heads, attention.kv_heads, attention.qk_dim, attention.v_dim) == (128, 8, 192, 128)
        assert (attention.rotary_dim, attention.value_scale) == (64, 0.612)
    assert (config.full.rope_theta, config.full.sink, config.full.visible_keys) == (1e7, False, None)
    assert (config.swa.rope_theta, config.swa.sink, config.swa.visible_keys) == (1e4, True, 129)
    moe = config.moe
    assert (moe.experts, moe.top_k, moe.intermediate, moe.groups, moe.top_groups) == (384, 8, 2048, 1, 1)
    assert (moe.normalize, moe.scaling, config.dense_intermediate) == (True, 1.0, 16384)
    assert (config.rms_eps, config.max_positions, config.router_dtype) == (1e-5, 1048576, "float32")
    assert config.fused_qkv
    assert config.quantization is not None
    assert (config.quantization.expert_format, config.quantization.fp8_block) == ("mxfp4", (128, 128))
    assert config.eos_ids == ()


def test_the_release_drafter():
    config = drafter()
    assert (config.hidden_size, config.num_layers, config.intermediate, config.rms_eps) == (6144, 5, 16384, 1e-5)
    assert (config.block_size, config.mask_token_id, config.num_target_layers) == (8, 151669, 70)
    assert config.target_layer_ids == (0, 15, 31, 47, 69)
    attention = config.attention
    assert (attention.heads, attention.kv_heads, attention.qk_dim, attention.v_dim) == (128, 8, 128, 128)
    assert (attention.rotary_dim, attention.rope_theta, attention.value_scale) == (64, 1e4, 0.612)
    assert (attention.sink, attention.visible_keys, config.block_causal) == (True, 1024, False)


def test_other_presets():
    configs = {name: BackboneConfig.from_hf(preset.backbone) for name, preset in PRESETS.items()}
    flash = configs["mimo-v2-flash"]
    assert (flash.full.kv_heads, flash.swa.kv_heads, flash.fused_qkv, flash.full.rope_theta) == (4, 8, False, 5e6)
    assert flash.quantization is not None
    assert flash.quantization.expert_format == "fp8"
    assert configs["mimo-v2.5"].eos_ids == (151645,)
    assert configs["mimo-v2.6-pro"].router_dtype == "bfloat16"
    assert configs["tiny"].max_positions == 1048576
    for name, preset in PRESETS.items():
        if preset.drafter is not None:
            DrafterConfig.from_hf(preset.drafter).check_fits(configs[name])
    assert DrafterConfig.from_hf(PRESETS["mimo-v2.6-pro"].drafter or {}).mask_token_id == 151675


def test_golden_configurations():
    paths = [path for root in golden_roots() for path in sorted(root.rglob("config.json"))]
    assert len(paths) >= 8
    for path in paths:
        values = read_json_object(path)
        read = DrafterConfig.from_hf if values["model_type"] == "qwen3" else BackboneConfig.from_hf
        assert read(values)


def test_settings():
    assert BackboneConfig.from_hf(PRO.backbone, swa_visible_keys=128).swa.visible_keys == 128
    assert BackboneConfig.from_hf(PRO.backbone, router_dtype="bfloat16").router_dtype == "bfloat16"
    v26 = PRESETS["mimo-v2.6-pro"].backbone
    assert BackboneConfig.from_hf(v26, router_dtype="float32").router_dtype == "float32"
    assert DrafterConfig.from_hf(DRAFTER, rope_theta=5e6).attention.rope_theta == 5e6
    assert DrafterConfig.from_hf(DRAFTER, block_causal=True).block_causal
    with pytest.raises(ConfigError, match="swa_visible_keys"):
        BackboneConfig.from_hf(PRO.backbone, swa_visible_keys=0)
    with pytest.raises(ConfigError, match="router_dtype"):
        BackboneConfig.from_hf(PRO.backbone, router_dtype="float16")


REQUIRED = [
    "model_type",
    "hidden_act",
    "attention_bias",
    "tie_word_embeddings",
    "scoring_func",
    "topk_method",
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "partial_rotary_factor",
    "rope_theta",
    "max_position_embeddings",
    "add_full_attention_sink_bias",
    "add_swa_attention_sink_bias",
    "attention_value_scale",
    "hybrid_layer_pattern",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "intermediate_size",
    "moe_layer_freq",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "layernorm_epsilon",
]


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("absent", [..., None])
def test_required_keys(key, absent):
    with pytest.raises(ConfigError, match=f"config.json: {key} is missing"):
        # A key of full attention is not missed by the SWA layers, which have their own.
        backbone(**{key: absent})


@pytest.mark.parametrize(
    "key",
    [
        "attention_projection_layout",
        "rope_scaling",
        "quantization_config",
        "n_shared_experts",
        "routed_scaling_factor",
        "moe_router_dtype",
        "eos_token_id",
        "torch_dtype",
        "architectures",
        "auto_map",
        "attention_chunk_size",
        "hybrid_block_size",
    ],
)
def test_null_is_absent(key):
    assert backbone(**{key: None}) == backbone(**{key: ...})


def test_fallbacks():
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim")
    without = {f"swa_{name}": ... for name in names} | {"swa_rope_theta": ...}
    config = backbone(num_key_value_heads=16, v_head_dim=64, **without)
    assert (config.swa.heads, config.swa.kv_heads, config.swa.qk_dim, config.swa.v_dim) == (128, 16, 192, 64)
    assert config.swa.rope_theta == 1e7
    config = backbone(v_head_dim=..., swa_v_head_dim=...)
    assert (config.full.v_dim, config.swa.v_dim) == (192, 192)
    assert backbone(sliding_window=...) == backbone(sliding_window_size=...) == backbone()
    assert not backbone(attention_projection_layout=...).fused_qkv
    assert backbone(moe_router_dtype=...).router_dtype == "float32"
    assert backbone(quantization_config=...).quantization is None
    pattern = backbone(hybrid_layer_pattern=..., hybrid_block_size=7)
    assert [i for i, k in enumerate(pattern.layers) if k.attention == "full"] == list(range(6, 70, 7))
    frequency = backbone(moe_layer_freq=4)
    assert [i for i, k in enumerate(frequency.layers) if k.mlp == "moe"] == list(range(0, 70, 4))
    assert all(k.mlp == "dense" for k in backbone(moe_layer_freq=0).layers)
    assert backbone(eos_token_id=[3, 5]).eos_ids == (3, 5)
    assert backbone(routed_scaling_factor=2.5).moe.scaling == 2.5


def test_rope_in_its_own_object():
    inner = {"rope_type": "default", "type": None, "rope_theta": 10000000, "partial_rotary_factor": 0.334}
    for name in ("rope_parameters", "rope_scaling"):
        assert backbone(**{name: inner}) == backbone()
        moved = backbone(**{name: inner}, rope_theta=..., partial_rotary_factor=...)
        assert moved == backbone()
    # It tells of full attention only.
    assert backbone(rope_parameters=inner | {"rope_theta": 5e6}, rope_theta=...).swa.rope_theta == 1e4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 64}, "sliding_window is 64 but sliding_window_size is 128"),
        ({"rope_parameters": {"rope_theta": 5e6}}, "rope_theta is 10000000 but rope_parameters.rope_theta is 5000000"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type"),
        ({"rope_scaling": "default"}, "rope_scaling must be an object"),
        ({"model_type": "qwen3"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_bias": 0}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"hidden_size": "6144"}, "hidden_size must be an integer"),
        ({"hidden_size": 6144.0}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"hidden_size": 0}, "hidden_size must be an integer"),
        ({"hidden_size": 10**400}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 71}, "hybrid_layer_pattern must be a list of 71"),
        ({"num_hidden_layers": 2**31 - 1, "hybrid_layer_pattern": ..., "hybrid_block_size": 8}, "num_hidden_layers"),
        ({"hybrid_layer_pattern": [2] * 70}, "hybrid_layer_pattern"),
        ({"moe_layer_freq": [1] * 69}, "moe_layer_freq"),
        ({"moe_layer_freq": True}, "moe_layer_freq"),
        ({"rope_theta": 0}, "rope_theta must be a number above 0"),
        ({"rope_theta": 10**400}, "rope_theta must be a number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number"),
        ({"layernorm_epsilon": float("inf")}, "layernorm_epsilon"),
        ({"layernorm_epsilon": "1e-5"}, "layernorm_epsilon"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must be a number above 0 and at most 1"),
        ({"partial_rotary_factor": 0.017}, "partial_rotary_factor leaves 3 rotary dimensions"),
        ({"num_key_value_heads": 7}, "num_attention_heads (128) is not a multiple of num_key_value_heads (7)"),
        ({"swa_num_key_value_heads": 7}, "swa_num_attention_heads (128) is not a multiple"),
        ({"n_group": 7}, "n_routed_experts (384) is not a multiple of n_group (7)"),
        ({"topk_group": 2}, "topk_group (2) is more than n_group (1)"),
        ({"n_group": 384}, "fewer than two experts a group"),
        ({"n_group": 96, "topk_group": 1}, "num_experts_per_tok (8) is more"),
        ({"num_experts_per_tok": 385}, "num_experts_per_tok (385) is more"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"attention_projection_layout": "qkv"}, "attention_projection_layout"),
        ({"moe_router_dtype": "float16"}, "moe_router_dtype"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"quantization_config": []}, "quantization_config must be an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, "weight_block_size"),
    ],
)
def test_contradictions(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        backbone(**changes)


@pytest.mark.parametrize(("key", "value"), [("fmt", "e5m2"), ("store_dtype", "nvfp4"), ("mxfp4_block_size", 16)])
def test_unknown_quantisation(key, value):
    with pytest.raises(ConfigError, match=f"quantization_config: {key}"):
        backbone(quantization_config=PRO.backbone["quantization_config"] | {key: value})


def test_a_lost_value_scale_says_what_it_usually_is():
    with pytest.raises(ConfigError, match=r"attention_value_scale is missing.*about 0\.612"):
        backbone(attention_value_scale=...)


def test_unknown_keys_are_logged(caplog):
    with caplog.at_level(logging.INFO):
        backbone(something_new=1)
    assert "something_new" in caplog.text


@pytest.mark.parametrize(
    "key",
    [
        "hidden_act",
        "attention_bias",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "num_target_layers",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "rms_norm_eps",
        "architectures",
        "dflash_config",
    ],
)
def test_required_keys_of_a_drafter(key):
    for absent in (..., None):
        values = {k: v for k, v in (DRAFTER | {key: absent}).items() if v is not ...}
        with pytest.raises(ConfigError, match=rf"dflash/config\.json: {key}"):
            DrafterConfig.from_hf(values)


@pytest.mark.parametrize("key", ["target_layer_ids", "mask_token_id"])
def test_required_keys_of_dflash_config(key):
    with pytest.raises(ConfigError, match=key):
        drafter(**{key: ...})


def test_drafter_fallbacks():
    optional = {
        "use_swa": ...,
        "swa_window_size": ...,
        "attention_value_scale": ...,
        "attention_sink_bias": ...,
        "backbone_rotary_base": ...,
    }
    plain = drafter({"partial_rotary_factor": ..., "sliding_window": None, "v_head_dim": ...}, **optional)
    attention = plain.attention
    assert (attention.rotary_dim, attention.visible_keys, attention.value_scale) == (128, None, 1.0)
    assert (attention.sink, attention.v_dim) == (False, 128)
    assert drafter(block_size=...) == drafter({"block_size": ...}) == drafter()
    assert drafter({"vocab_size": 1}) == drafter()
    assert drafter({"is_causal": True}).block_causal


@pytest.mark.parametrize(
    ("changes", "dflash", "message"),
    [
        ({"block_size": 16}, {}, "block_size is 16 but dflash_config.block_size is 8"),
        ({"block_size": ...}, {"block_size": ...}, "block_size is missing"),
        ({}, {"block_size": 1, "x": 1}, "block_size"),
        ({"block_size": 1}, {"block_size": 1}, "block_size must be at least 2"),
        ({"sliding_window": 512}, {}, "sliding_window is 512 but dflash_config makes the window 1024"),
        ({}, {"use_swa": False}, "sliding_window is 1024 but dflash_config makes the window None"),
        ({}, {"swa_window_size": ...}, "swa_window_size is missing"),
        ({}, {"target_layer_ids": [0, 15, 70]}, "target_layer_ids"),
        ({}, {"target_layer_ids": [15, 0]}, "target_layer_ids"),
        ({}, {"target_layer_ids": [0, 0]}, "target_layer_ids"),
        ({}, {"target_layer_ids": []}, "target_layer_ids"),
        ({}, {"target_layer_ids": "all"}, "target_layer_ids"),
        ({}, {"mask_token_id": -1}, "mask_token_id"),
        ({}, {"attention_sink_bias": 1}, "attention_sink_bias must be true or false"),
        ({"architectures": ["Qwen3ForCausalLM"]}, {}, "architectures"),
        ({"architectures": 5}, {}, "architectures"),
        ({"architectures": "DFlashDraftModelX"}, {}, "architectures"),
        ({"num_key_value_heads": 7}, {}, "num_key_value_heads (7)"),
        ({"attention_bias": True}, {}, "attention_bias"),
    ],
)
def test_drafter_contradictions(changes, dflash, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        drafter(changes, **dflash)


def test_a_drafter_of_another_backbone():
    with pytest.raises(ConfigError, match="hidden_size is 6144, the backbone's is 4096"):
        drafter().check_fits(BackboneConfig.from_hf(PRESETS["mimo-v2.5"].backbone))
    with pytest.raises(ConfigError, match="num_target_layers is 71, the backbone has 70"):
        drafter({"num_target_layers": 71}).check_fits(backbone())


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'"x"'])
def test_files_that_are_no_configuration(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for kind in (BackboneConfig, DrafterConfig):
        with pytest.raises(ConfigError, match=r"config\.json"):
            kind.from_folder(tmp_path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file; expected a model folder"):
        BackboneConfig.from_folder(tmp_path)


def test_presets_are_plain_json():
    for preset in PRESETS.values():
        assert json.loads(json.dumps(preset.backbone)) == preset.backbone
        assert json.loads(json.dumps(preset.drafter)) == preset.drafter
