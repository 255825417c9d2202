"""What a model is: frozen configurations read strictly from Hugging Face `config.json` files.

A key that is missing, contradictory or unsupported is a `ConfigError` that names the key. The only fallbacks are
those the family's own configuration class has (a missing `swa_*` key means its full-attention twin, and so on);
each stands beside the line that applies it. A key that is present but null counts as absent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mimo_jax.hf_keys import ConfigError, Keys, LayeredKeys, read_json_object

AttentionKind = Literal["full", "swa"]
MlpKind = Literal["dense", "moe"]

MOST_LAYERS = 10_000
MODEL_TYPES = ("mimo_v2", "mimo_v2_flash")


@dataclass(frozen=True)
class LayerKind:
    """What distinguishes one decoder layer from another; layers of one kind are stacked."""

    attention: AttentionKind
    mlp: MlpKind

    @property
    def name(self) -> str:
        """The key of this kind in the parameter tree, such as `swa_moe`."""
        return f"{self.attention}_{self.mlp}"


@dataclass(frozen=True)
class AttentionConfig:
    """Shapes and constants of one kind of attention."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    rotary_dim: int
    rope_theta: float
    sink: bool
    """Whether each head has a learned logit in the softmax denominator."""
    visible_keys: int | None
    """Keys a query sees, itself included: t - visible_keys + 1 .. t. None: all of them."""
    value_scale: float


@dataclass(frozen=True)
class MoeConfig:
    """Router and experts."""

    experts: int
    top_k: int
    intermediate: int
    groups: int
    top_groups: int
    normalize: bool
    scaling: float


@dataclass(frozen=True)
class QuantConfig:
    """What `quantization_config` says of the stored weights. The dtype of each stored tensor has the last word."""

    expert_format: Literal["fp8", "mxfp4"]
    fp8_block: tuple[int, int]


@dataclass(frozen=True)
class BackboneConfig:
    """The text backbone (`MiMoV2ForCausalLM`, `MiMoV2FlashForCausalLM`)."""

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerKind, ...]
    full: AttentionConfig
    swa: AttentionConfig
    sliding_window: int
    dense_intermediate: int
    moe: MoeConfig
    rms_eps: float
    max_positions: int
    router_dtype: Literal["float32", "bfloat16"]
    fused_qkv: bool
    quantization: QuantConfig | None
    eos_ids: tuple[int, ...]

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention that occur, in order of first occurrence."""
        kinds: dict[AttentionKind, None] = {layer.attention: None for layer in self.layers}
        return tuple(kinds)

    def attention(self, kind: AttentionKind) -> AttentionConfig:
        """The attention of layers of this kind."""
        return self.full if kind == "full" else self.swa

    def layers_of(self, kind: LayerKind) -> tuple[int, ...]:
        """Absolute numbers of the layers of one kind, in order: their rows in that kind's stacked parameters."""
        return tuple(i for i, layer in enumerate(self.layers) if layer == kind)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds that occur, in order of first occurrence."""
        return tuple(dict.fromkeys(self.layers))

    @classmethod
    def from_hf(
        cls,
        hf: Mapping[str, Any],
        *,
        swa_visible_keys: int | None = None,
        router_dtype: str | None = None,
    ) -> "BackboneConfig":
        """Read a `config.json`.

        Args:
            hf: The file's contents.
            swa_visible_keys: Keys an SWA query sees. Default: `sliding_window_size` + 1, the convention of SGLang and
                of transformers' native port; the Hugging Face remote code and vLLM use `sliding_window_size`.
            router_dtype: `float32` or `bfloat16`. Default: `moe_router_dtype` of the file, float32 where it is absent.

        Raises:
            ConfigError: With the key that is missing, contradictory or unsupported.
        """
        keys = Keys(hf, "config.json")
        keys.require("model_type", *MODEL_TYPES)
        keys.require("hidden_act", "silu")
        keys.require("attention_bias", False)
        keys.require("tie_word_embeddings", False)
        keys.require("scoring_func", "sigmoid")
        keys.require("topk_method", "noaux_tc")
        if keys.has("n_shared_experts") and keys.integer("n_shared_experts", at_least=0) > 0:
            raise ConfigError("config.json: n_shared_experts is not supported: the family has no shared experts")

        hidden = keys.integer("hidden_size")
        count = keys.integer("num_hidden_layers")
        if count > MOST_LAYERS:
            raise ConfigError(f"config.json: num_hidden_layers is {count}; at most {MOST_LAYERS} are supported")
        rope = _rope(keys)
        window = _sliding_window(keys)
        visible = window + 1 if swa_visible_keys is None else swa_visible_keys
        if visible < 1:
            raise ConfigError(f"swa_visible_keys must be at least 1 (a query sees itself), not {visible}")
        factor = rope.number("partial_rotary_factor", above=0, at_most=1)
        theta = rope.number("rope_theta", above=0)
        scale = _value_scale(keys, hidden)

        full = _attention(keys, "", factor, theta, keys.boolean("add_full_attention_sink_bias"), None, scale)
        swa_theta = keys.number("swa_rope_theta", above=0) if keys.has("swa_rope_theta") else theta
        swa_sink = keys.boolean("add_swa_attention_sink_bias")
        swa = _attention(keys, "swa_", factor, swa_theta, swa_sink, visible, scale)

        experts = keys.integer("n_routed_experts")
        moe = MoeConfig(
            experts=experts,
            top_k=keys.integer("num_experts_per_tok"),
            intermediate=keys.integer("moe_intermediate_size"),
            groups=keys.integer("n_group"),
            top_groups=keys.integer("topk_group"),
            normalize=keys.boolean("norm_topk_prob"),
            # null means 1.0 (backbone configurations of the release carry null)
            scaling=keys.number("routed_scaling_factor", above=0) if keys.has("routed_scaling_factor") else 1.0,
        )
        _check_moe(moe)
        layout = keys.choice("attention_projection_layout", "split", "fused_qkv", default="split")
        chosen_router = router_dtype or keys.choice("moe_router_dtype", "float32", "bfloat16", default="float32")
        if chosen_router not in ("float32", "bfloat16"):
            raise ConfigError(f"router_dtype must be float32 or bfloat16, not {chosen_router!r}")
        config = cls(
            vocab_size=keys.integer("vocab_size"),
            hidden_size=hidden,
            layers=_layers(keys, count),
            full=full,
            swa=swa,
            sliding_window=window,
            dense_intermediate=keys.integer("intermediate_size"),
            moe=moe,
            rms_eps=keys.number("layernorm_epsilon", above=0),
            max_positions=keys.integer("max_position_embeddings"),
            router_dtype=chosen_router,
            fused_qkv=layout == "fused_qkv",
            quantization=_quantization(keys),
            eos_ids=keys.integers("eos_token_id"),
        )
        keys.log_unknown()
        return config

    @classmethod
    def from_folder(cls, folder: Path, **settings: Any) -> "BackboneConfig":
        """Read `config.json` in a checkpoint folder; `settings` as in `from_hf`."""
        return cls.from_hf(read_json_object(folder / "config.json"), **settings)


@dataclass(frozen=True)
class DrafterConfig:
    """The DFlash drafter (`DFlashDraftModel`), whose embedding and LM head are its backbone's."""

    hidden_size: int
    num_layers: int
    attention: AttentionConfig
    intermediate: int
    rms_eps: float
    block_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    mask_token_id: int
    block_causal: bool = False
    """Whether rows of a block see only earlier rows. The release's drafter is bidirectional."""

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, rope_theta: float | None = None, block_causal: bool = False
    ) -> "DrafterConfig":
        """Read the drafter's `config.json`.

        Args:
            hf: The file's contents.
            rope_theta: Replaces the file's `rope_theta` for every query and key, to try another base
                (the file's `backbone_rotary_base` is metadata that no engine uses).
            block_causal: Make the block causal, as some drafters of other families are.

        Raises:
            ConfigError: With the key that is missing, contradictory or unsupported.
        """
        keys = Keys(hf, "dflash/config.json")
        architectures = hf.get("architectures")
        if not isinstance(architectures, list) or "DFlashDraftModel" not in architectures:
            raise ConfigError(f"dflash/config.json: architectures must name DFlashDraftModel, not {architectures!r}")
        keys.require("hidden_act", "silu")
        keys.require("attention_bias", False)
        if not isinstance(hf.get("dflash_config"), Mapping):
            raise ConfigError("dflash/config.json: dflash_config is missing or not an object")
        dflash = Keys(hf["dflash_config"], "dflash/config.json: dflash_config")
        keys.known.add("dflash_config")

        # The same two facts may stand at the top level and in dflash_config: they must agree.
        block = _agreeing(keys, dflash, "block_size")
        causal = dflash.optional_boolean("is_causal", keys.optional_boolean("is_causal", block_causal))
        heads, kv_heads = keys.integer("num_attention_heads"), keys.integer("num_key_value_heads")
        head_dim = keys.integer("head_dim")
        v_dim = keys.integer("v_head_dim") if keys.has("v_head_dim") else head_dim
        # Absent keys mean a plain Qwen3-style drafter: full rotary, no window, no scale, no sinks.
        factor = keys.number("partial_rotary_factor", above=0, at_most=1) if keys.has("partial_rotary_factor") else 1.0
        scale = dflash.number("attention_value_scale", above=0) if dflash.has("attention_value_scale") else 1.0
        attention = AttentionConfig(
            heads=heads,
            kv_heads=kv_heads,
            qk_dim=head_dim,
            v_dim=v_dim,
            rotary_dim=int(head_dim * factor),
            rope_theta=keys.number("rope_theta", above=0) if rope_theta is None else rope_theta,
            sink=dflash.optional_boolean("attention_sink_bias", False),
            visible_keys=_drafter_window(keys, dflash),
            value_scale=scale,
        )
        _check_attention(attention, "dflash/config.json", "")
        ids = dflash.integers("target_layer_ids")
        targets = keys.integer("num_target_layers")
        if not ids or list(ids) != sorted(set(ids)) or ids[-1] >= targets or ids[0] < 0:
            raise ConfigError(
                f"dflash/config.json: target_layer_ids must be increasing layer numbers below num_target_layers "
                f"({targets}), not {list(ids)}"
            )
        config = cls(
            hidden_size=keys.integer("hidden_size"),
            num_layers=keys.integer("num_hidden_layers"),
            attention=attention,
            intermediate=keys.integer("intermediate_size"),
            rms_eps=keys.number("rms_norm_eps", above=0),
            block_size=block,
            target_layer_ids=ids,
            num_target_layers=targets,
            mask_token_id=dflash.integer("mask_token_id", at_least=0),
            block_causal=causal,
        )
        if config.block_size < 2:
            raise ConfigError(f"dflash/config.json: block_size must be at least 2, not {config.block_size}")
        return config

    @classmethod
    def from_folder(cls, folder: Path, **settings: Any) -> "DrafterConfig":
        """Read `config.json` in a drafter's folder; `settings` as in `from_hf`."""
        return cls.from_hf(read_json_object(folder / "config.json"), **settings)

    def check_fits(self, backbone: BackboneConfig) -> None:
        """Raise `ConfigError` unless this drafter was made for a backbone of this shape."""
        if self.hidden_size != backbone.hidden_size:
            raise ConfigError(
                f"the drafter does not fit its backbone: hidden_size is {self.hidden_size}, "
                f"the backbone's is {backbone.hidden_size}"
            )
        if self.num_target_layers != len(backbone.layers):
            raise ConfigError(
                f"the drafter does not fit its backbone: num_target_layers is {self.num_target_layers}, "
                f"the backbone has {len(backbone.layers)} layers"
            )


def drafter_folder(model: Path) -> Path | None:
    """Where a checkpoint's own drafter lies, if it has one."""
    folder = model / "dflash"
    return folder if folder.is_dir() else None


def _rope(keys: Keys) -> Keys:
    inner: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):  # two names of one thing
        if not keys.has(name):
            continue
        value = keys.values[name]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{keys.where}: {name} must be an object, not {value!r}")
        for key in ("rope_type", "type"):
            if value.get(key) not in (None, "default"):
                raise ConfigError(
                    f"{keys.where}: {name}.{key} {value[key]!r} is not supported: only default (unscaled)"
                )
        inner.update(value)
    return LayeredKeys(keys, inner)


def _sliding_window(keys: Keys) -> int:
    names = [k for k in ("sliding_window_size", "sliding_window") if keys.has(k)]  # each stands in for the other
    if not names:
        raise ConfigError(f"{keys.where}: sliding_window_size is missing")
    sizes = {keys.integer(k) for k in names}
    if len(sizes) > 1:
        raise ConfigError(
            f"{keys.where}: sliding_window is {keys.values['sliding_window']} but "
            f"sliding_window_size is {keys.values['sliding_window_size']}"
        )
    return sizes.pop()


def _value_scale(keys: Keys, hidden: int) -> float:
    if keys.has("attention_value_scale"):
        return keys.number("attention_value_scale", above=0)
    v_dim = keys.integer("v_head_dim") if keys.has("v_head_dim") else keys.integer("head_dim")
    usual = math.sqrt(hidden / (keys.integer("num_attention_heads") * v_dim))
    raise ConfigError(
        f"{keys.where}: attention_value_scale is missing; without it outputs are wrong. "
        f"For these sizes the family uses about {usual:.3f}"
    )


def _attention(
    keys: Keys, prefix: str, factor: float, theta: float, sink: bool, visible: int | None, scale: float
) -> AttentionConfig:
    def size(name: str) -> int:
        # a missing swa_* key means its full-attention twin, a missing v_head_dim means head_dim
        candidates = [prefix + name, name] + (["head_dim"] if name == "v_head_dim" else [])
        return next((keys.integer(c) for c in candidates if keys.has(c)), None) or keys.integer(name)

    heads_key = "num_attention_heads"
    qk_dim = size("head_dim")
    attention = AttentionConfig(
        heads=size(heads_key),
        kv_heads=size("num_key_value_heads"),
        qk_dim=qk_dim,
        v_dim=size("v_head_dim"),
        rotary_dim=int(qk_dim * factor),
        rope_theta=theta,
        sink=sink,
        visible_keys=visible,
        value_scale=scale,
    )
    _check_attention(attention, keys.where, prefix)
    return attention


def _check_attention(attention: AttentionConfig, where: str, prefix: str) -> None:
    if attention.heads % attention.kv_heads:
        raise ConfigError(
            f"{where}: {prefix}num_attention_heads ({attention.heads}) is not a multiple of "
            f"{prefix}num_key_value_heads ({attention.kv_heads})"
        )
    if attention.rotary_dim < 2 or attention.rotary_dim % 2:
        raise ConfigError(
            f"{where}: partial_rotary_factor leaves {attention.rotary_dim} rotary dimensions of "
            f"{prefix}head_dim {attention.qk_dim}; an even number of at least 2 is needed"
        )


def _layers(keys: Keys, count: int) -> tuple[LayerKind, ...]:
    if keys.has("hybrid_layer_pattern"):
        windowed = _flags(keys, "hybrid_layer_pattern", count)
    elif keys.has("hybrid_block_size"):
        size = keys.integer("hybrid_block_size")
        windowed = [(i + 1) % size != 0 for i in range(count)]
    else:
        raise ConfigError(f"{keys.where}: hybrid_layer_pattern is missing")
    if isinstance(keys.get("moe_layer_freq"), int):
        frequency = keys.integer("moe_layer_freq", at_least=0)
        sparse = [frequency > 0 and i % frequency == 0 for i in range(count)]
    else:
        sparse = _flags(keys, "moe_layer_freq", count)
    return tuple(
        LayerKind("swa" if w else "full", "moe" if s else "dense") for w, s in zip(windowed, sparse, strict=True)
    )


def _flags(keys: Keys, key: str, count: int) -> list[bool]:
    values = keys.integers(key)
    if len(values) != count or not set(values) <= {0, 1}:
        raise ConfigError(f"{keys.where}: {key} must be a list of {count} zeros and ones, not {list(values)}")
    return [bool(v) for v in values]


def _check_moe(moe: MoeConfig) -> None:
    def fail(reason: str) -> None:
        raise ConfigError(f"config.json: {reason}")

    if moe.experts % moe.groups:
        fail(f"n_routed_experts ({moe.experts}) is not a multiple of n_group ({moe.groups})")
    if not moe.top_groups <= moe.groups:
        fail(f"topk_group ({moe.top_groups}) is more than n_group ({moe.groups})")
    if moe.groups > 1 and moe.experts // moe.groups < 2:
        fail(f"n_group ({moe.groups}) leaves fewer than two experts a group, and a group is scored by its best two")
    if moe.top_k > moe.experts // moe.groups * moe.top_groups:
        fail(f"num_experts_per_tok ({moe.top_k}) is more than the experts that routing can reach")


def _quantization(keys: Keys) -> QuantConfig | None:
    if not keys.has("quantization_config"):
        return None
    if not isinstance(keys.values["quantization_config"], Mapping):
        raise ConfigError(f"{keys.where}: quantization_config must be an object")
    quant = Keys(keys.values["quantization_config"], f"{keys.where}: quantization_config")
    quant.require("quant_method", "fp8")
    if quant.has("fmt"):
        quant.require("fmt", "e4m3")
    block = quant.integers("weight_block_size")
    if len(block) != 2 or min(block) < 1:
        raise ConfigError(f"{quant.where}: weight_block_size must be two positive integers, not {list(block)}")
    expert_format = quant.choice("store_dtype", "fp8", "mxfp4", default="fp8")
    if expert_format == "mxfp4" and quant.has("mxfp4_block_size"):
        quant.require("mxfp4_block_size", 32)
    return QuantConfig(expert_format=expert_format, fp8_block=(block[0], block[1]))  # pyright: ignore[reportArgumentType]


def _agreeing(outer: Keys, inner: Keys, key: str) -> int:
    if outer.has(key) and inner.has(key) and outer.values[key] != inner.values[key]:
        raise ConfigError(
            f"{outer.where}: {key} is {outer.values[key]!r} but dflash_config.{key} is {inner.values[key]!r}"
        )
    return (inner if inner.has(key) else outer).integer(key)


def _drafter_window(keys: Keys, dflash: Keys) -> int | None:
    """Keys a row sees, itself included, or None; the top-level `sliding_window` may only repeat it."""
    window = dflash.integer("swa_window_size") if dflash.optional_boolean("use_swa", False) else None
    if keys.has("sliding_window") and keys.integer("sliding_window") != window:
        raise ConfigError(
            f"{keys.where}: sliding_window is {keys.values['sliding_window']} but dflash_config makes the window "
            f"{window} (swa_window_size where use_swa is true)"
        )
    return window
