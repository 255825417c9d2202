"""Configurations in Hugging Face form: the family's real sizes, and small ones of the same shape."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_jax.config import BackboneConfig, DrafterConfig


@dataclass(frozen=True)
class Preset:
    """A checkpoint's configurations and what else its files hold."""

    backbone: dict[str, Any]
    """`config.json`."""
    drafter: dict[str, Any] | None
    """`dflash/config.json`."""
    mtp_layers: int
    """Multi-token-prediction blocks, which the files hold and this project does not use."""

    def configs(self) -> tuple[BackboneConfig, DrafterConfig | None]:
        """Both configurations.

        Raises:
            ConfigError: One contradicts itself, or the other.
        """
        config = BackboneConfig.from_hf(self.backbone)
        drafter = None if self.drafter is None else DrafterConfig.from_hf(self.drafter)
        if drafter is not None:
            drafter.check_fits(config)
        return config, drafter


def quantization_config(layers: int, store_dtype: str | None) -> dict[str, Any]:
    """The release's `quantization_config`: FP8 linears but for o_proj.

    Args:
        layers: Of the backbone.
        store_dtype: Of the experts: `mxfp4`, or `fp8`, which older releases leave out (None).
    """
    fields: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "ignored_layers": [
            *(f"model.layers.{i}.self_attn.o_proj" for i in range(layers)),
            "model.decoder.self_attn.o_proj",
        ],
    }
    if store_dtype is not None:
        fields["store_dtype"] = store_dtype
    if store_dtype == "mxfp4":
        fields["mxfp4_block_size"] = 32
    return fields


def _backbone(
    *,
    hidden: int,
    heads: int,
    kv_heads: int,
    layers: int,
    full_layers: Sequence[int],
    experts: int,
    value_scale: float,
    store_dtype: str | None,
    **more: Any,
) -> dict[str, Any]:
    """The fields that the family shares, with the sizes given; `more` adds or replaces fields."""
    fields: dict[str, Any] = {
        "architectures": ["MiMoV2ForCausalLM"],
        "model_type": "mimo_v2",
        "auto_map": {
            "AutoConfig": "configuration_mimo_v2.MiMoV2Config",
            "AutoModelForCausalLM": "modeling_mimo_v2.MiMoV2ForCausalLM",
        },
        "torch_dtype": "bfloat16",
        "vocab_size": 152576,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "num_attention_heads": heads,
        "swa_num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "swa_num_key_value_heads": 8,
        "head_dim": 192,
        "swa_head_dim": 192,
        "v_head_dim": 128,
        "swa_v_head_dim": 128,
        "partial_rotary_factor": 0.334,
        "rope_theta": 10000000,
        "swa_rope_theta": 10000,
        "max_position_embeddings": 1048576,
        "sliding_window": 128,
        "sliding_window_size": 128,
        "attention_chunk_size": 128,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "attention_value_scale": value_scale,
        "attention_projection_layout": "fused_qkv",
        "tie_word_embeddings": False,
        "hybrid_layer_pattern": [int(i not in full_layers) for i in range(layers)],
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "intermediate_size": 16384,
        "moe_layer_freq": [0] + [1] * (layers - 1),
        "n_shared_experts": None,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
        "layernorm_epsilon": 1e-05,
        "initializer_range": 0.02,
        "use_cache": True,
        "quantization_config": quantization_config(layers, store_dtype),
    }
    return fields | more


def _drafter(backbone: dict[str, Any], target_layers: Sequence[int], mask_token: int, **more: Any) -> dict[str, Any]:
    """A drafter for a backbone, with the release's fields; `more` adds or replaces fields, `dflash_config`'s too."""
    dflash = {
        "target_layer_ids": list(target_layers),
        "mask_token_id": mask_token,
        "num_anchors": 4096,
        "block_size": 8,
        "loss_decay_gamma": 7.0,
        "use_swa": True,
        "swa_window_size": more.get("sliding_window", 1024),
        "backbone_rotary_base": 5000000,
        "attention_value_scale": backbone["attention_value_scale"],
        "attention_sink_bias": True,
    }
    fields = {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3",
        "hidden_size": backbone["hidden_size"],
        "intermediate_size": 16384,
        "num_hidden_layers": 5,
        "num_attention_heads": backbone["num_attention_heads"],
        "num_key_value_heads": 8,
        "head_dim": 128,
        "v_head_dim": 128,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-05,
        "block_size": 8,
        "num_target_layers": backbone["num_hidden_layers"],
        "vocab_size": backbone["vocab_size"],
        "max_position_embeddings": 262144,
        "sliding_window": 1024,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "dflash_config": dflash,
    }
    return fields | more


_PRO_FULL_LAYERS = (0, 7, 15, 23, 31, 39, 47, 55, 62, 69)
_FLASH_FULL_LAYERS = (0, 5, 11, 17, 23, 29, 35, 41, 47)

# The FP4 release's own config.json was not seen. rope_theta is 10,000,000 in the FP8 release and in V2.6-Pro, while the
# FP4 release's card says 5,000,000: a real checkpoint's config.json decides.
_PRO = _backbone(
    hidden=6144,
    heads=128,
    kv_heads=8,
    layers=70,
    full_layers=_PRO_FULL_LAYERS,
    experts=384,
    value_scale=0.612,
    store_dtype="mxfp4",
)
# Layer kinds of V2.6-Pro are taken to be V2.5-Pro's.
_V26_PRO = copy.deepcopy(_PRO) | {"moe_router_dtype": "bfloat16"}

_V25 = _backbone(
    hidden=4096,
    heads=64,
    kv_heads=4,
    layers=48,
    full_layers=_FLASH_FULL_LAYERS,
    experts=256,
    value_scale=0.707,
    store_dtype="fp8",
    eos_token_id=151645,
    pad_token_id=151643,
    image_token_id=151655,
    video_token_id=151656,
    rope_scaling={"rope_type": "default"},
    vision_config={},
    audio_config={},
)

_FLASH = _backbone(
    hidden=4096,
    heads=64,
    kv_heads=4,
    layers=48,
    full_layers=_FLASH_FULL_LAYERS,
    experts=256,
    value_scale=0.707,
    store_dtype=None,
    architectures=["MiMoV2FlashForCausalLM"],
    model_type="mimo_v2_flash",
    auto_map={
        "AutoConfig": "configuration_mimo_v2_flash.MiMoV2FlashConfig",
        "AutoModelForCausalLM": "modeling_mimo_v2_flash.MiMoV2FlashForCausalLM",
    },
    attention_projection_layout="split",
    rope_theta=5000000,
    max_position_embeddings=262144,
)

# Small ones, for the byte tokenizer with its 512 ids, of which 505 is the mask token's. A chunk of the fused projection
# is [heads / kv_heads * 96 | 96 | 64] rows, so that a tile of 128 rows of FP8 scales holds the end of K and the
# beginning of V, as in the release.
_SMALL_SIZES = {
    "head_dim": 96,
    "swa_head_dim": 96,
    "v_head_dim": 64,
    "swa_v_head_dim": 64,
}

_TINY = _backbone(
    hidden=256,
    heads=8,
    kv_heads=2,
    layers=7,
    full_layers=(0, 3, 6),
    experts=16,
    value_scale=0.707,
    store_dtype="mxfp4",
    vocab_size=512,
    swa_num_key_value_heads=2,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    intermediate_size=512,
    sliding_window=32,
    sliding_window_size=32,
    attention_chunk_size=32,
    **_SMALL_SIZES,
)

_SMALL = _backbone(
    hidden=512,
    heads=16,
    kv_heads=4,
    layers=12,
    full_layers=(0, 4, 8, 11),
    experts=32,
    value_scale=0.707,
    store_dtype="mxfp4",
    vocab_size=512,
    swa_num_key_value_heads=4,
    num_experts_per_tok=4,
    moe_intermediate_size=128,
    intermediate_size=1024,
    **_SMALL_SIZES,
)

# The size of the model that comes with the package (`NANO`): 14 million parameters, 4 million active, for a byte
# tokenizer with 2048 ids, of which 2041 is the mask token's.
_NANO = _backbone(
    hidden=256,
    heads=8,
    kv_heads=2,
    layers=8,
    full_layers=(0, 3, 7),
    experts=16,
    value_scale=1.0,
    store_dtype="mxfp4",
    vocab_size=2048,
    swa_num_key_value_heads=2,
    head_dim=48,
    swa_head_dim=48,
    v_head_dim=32,
    swa_v_head_dim=32,
    rope_theta=100000,
    max_position_embeddings=4096,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    intermediate_size=768,
)

NANO = Path(__file__).parent / "nano"
"""The folder of the trained model that comes with the package."""

PRESETS: dict[str, Preset] = {
    "mimo-v2-flash": Preset(_FLASH, None, mtp_layers=3),
    "mimo-v2.5": Preset(_V25, _drafter(_V25, (0, 11, 23, 35, 47), 151675, rms_norm_eps=1e-06), mtp_layers=3),
    "mimo-v2.5-pro": Preset(_PRO, _drafter(_PRO, (0, 15, 31, 47, 69), 151669, vocab_size=152064), mtp_layers=3),
    "mimo-v2.6-pro": Preset(_V26_PRO, _drafter(_V26_PRO, (0, 15, 31, 47, 69), 151675, is_causal=False), mtp_layers=3),
    "nano": Preset(
        _NANO,
        _drafter(
            _NANO,
            (0, 2, 4, 6, 7),
            2041,
            intermediate_size=256,
            num_key_value_heads=2,
            head_dim=32,
            v_head_dim=32,
            sliding_window=256,
        ),
        mtp_layers=0,
    ),
    "tiny": Preset(
        _TINY,
        _drafter(
            _TINY,
            (0, 3, 6),
            505,
            intermediate_size=512,
            num_hidden_layers=2,
            num_key_value_heads=2,
            head_dim=32,
            v_head_dim=32,
            sliding_window=64,
        ),
        mtp_layers=1,
    ),
    "small": Preset(
        _SMALL,
        _drafter(
            _SMALL,
            (0, 4, 8, 11),
            505,
            intermediate_size=1024,
            num_hidden_layers=3,
            num_key_value_heads=4,
            head_dim=64,
            v_head_dim=64,
            sliding_window=256,
        ),
        mtp_layers=1,
    ),
}
"""By name. `mimo-v2.5-pro` is the FP4-DFlash release."""
