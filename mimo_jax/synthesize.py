"""Complete checkpoints with random weights, in the release's exact layout.

They have everything a reader can stumble over: fused qkv in chunks whose FP8 scale tiles straddle K and V, MXFP4
experts, multi-token-prediction blocks with other values under similar names, towers where the configuration has them,
a drafter with a mask vector beside it. The same seed makes the same bytes.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.byte_tokenizer import SMALLEST_VOCABULARY, write_byte_tokenizer
from mimo_jax.config import BackboneConfig, ConfigError, DrafterConfig, LayerKind
from mimo_jax.export import SHARD_BYTES, OutputTensor, check_room, new_folder, write_json, write_tensors
from mimo_jax.presets import PRESETS, Preset
from mimo_jax.progress import Report, reporter
from mimo_jax.qkv_layout import chunk_rows, tiles_of_chunk
from mimo_jax.safetensors_reader import NUMPY_DTYPES, CheckpointError
from mimo_jax.torch_sidecar import write_mask_embedding
from pallas_kernels.mxfp4 import BLOCK, MAGNITUDES

# What the small tokenizer learns its merges from.
_TEXT = """
The weather of a small harbour is made by the sea. In the morning a low fog lies over the water and the boats wait at
the wall with their lights on, and nobody can say whether the day will be warm or cold. Around nine the wind turns,
the fog opens like a curtain, and people come down from the houses with baskets, ropes, letters and questions. A fisher
tells the same story every week: how the nets came up empty for seven days and how, on the eighth, they were so heavy
that three men had to pull. Children listen and count the gulls. The baker has already sold most of the bread; what is
left goes to the school, where the teacher writes numbers on the board and asks which of them are prime. Two, three,
five, seven, eleven, thirteen, answers the class, and the clock above the door agrees. Later the market fills with
voices. Someone wants to know the price of apples, someone else explains that nothing is more useful than a good knife,
an old woman sells flowers that she grew behind her kitchen. At noon the bells ring and for an hour the streets are
quiet, because everybody is eating. Then work begins again: walls are painted, engines repaired, books returned, songs
practised. If you walk to the end of the pier in the evening you can see the first stars, and if you stay a little
longer you will hear the water moving between the stones, as it did before there was a harbour and as it will when
every name written on the boats has been forgotten. That is what the people here would answer if you asked them for the
meaning of the place; but usually visitors only ask the way to the station, and whether the last train is late.
"""

_PIECE = 1 << 22  # elements made at a time
_TOKENIZER_VOCABULARY = 512
_FP8_SPREAD = 96.0  # standard deviation of FP8 values before their scale; the format ends at 448
_MXFP4_RMS = float(np.sqrt(np.mean(MAGNITUDES.astype(np.float64) ** 2)))  # of codes drawn evenly


def synthesize(
    preset: str | Preset,
    out: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Report | None = None,
) -> None:
    """Write a checkpoint.

    Args:
        preset: A name of `PRESETS`, or configurations of one's own.
        out: The folder to make.
        seed: Of all values.
        overwrite: Replace `out` if it is a checkpoint folder.
        shard_bytes: Size of the safetensors files.
        progress: Called with (component, bytes so far, bytes in all).

    Raises:
        ConfigError: The configurations contradict themselves.
        CheckpointError: `out` is in the way, or the disk has too little room.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise CheckpointError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    config, drafter = preset.configs()
    if config.vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"vocab_size is {config.vocab_size}; the tokenizer written here needs {SMALLEST_VOCABULARY}")
    backbone_tensors = list(backbone_outputs(config, preset, seed))
    drafter_tensors = list(drafter_outputs(drafter, seed)) if drafter else []

    def sizes(tensors: list[OutputTensor]) -> int:
        return sum(t.nbytes for t in tensors)

    check_room(out, sizes(backbone_tensors) + sizes(drafter_tensors))
    with new_folder(out, overwrite) as folder:
        quantization = config.quantization
        metadata: dict[str, Any] = {"save_format": quantization.expert_format if quantization else "bf16"}
        if config.fused_qkv:
            metadata["tp_size"] = config.full.kv_heads
        write_tensors(
            folder,
            backbone_tensors,
            metadata=metadata,
            shard_bytes=shard_bytes,
            progress=reporter(progress, "backbone", sizes(backbone_tensors)),
        )
        write_json(folder / "config.json", preset.backbone)
        write_byte_tokenizer(folder, min(config.vocab_size, _TOKENIZER_VOCABULARY), [_TEXT])
        if drafter is not None and preset.drafter is not None:
            (folder / "dflash").mkdir()
            write_tensors(
                folder / "dflash",
                drafter_tensors,
                prefix="dflash_draft_model",
                shard_bytes=shard_bytes,
                progress=reporter(progress, "drafter", sizes(drafter_tensors)),
            )
            write_json(folder / "dflash" / "config.json", preset.drafter)
            mask = _Values(seed, "mask").normal("mask_embedding", (config.hidden_size,), 1.0)
            vector = np.concatenate(list(mask.produce()))
            write_mask_embedding(folder / "dflash" / "mask_embedding.pt", drafter.mask_token_id, vector)


def backbone_outputs(config: BackboneConfig, preset: Preset, seed: int) -> Iterator[OutputTensor]:
    """The tensors of a preset's backbone folder; values are made when they are written."""
    return _Backbone(config, preset, seed).tensors()


class _Values:
    """Makes tensors of random values; each tensor's values depend on the seed and its own name alone."""

    def __init__(self, seed: int, salt: str = ""):
        self._seed, self._salt = seed % 2**64, salt

    def normal(
        self,
        name: str,
        shape: tuple[int, ...],
        std: float,
        dtype: str = "BF16",
        *,
        mean: float = 0.0,
        zero: int | None = None,
    ) -> OutputTensor:
        """Normal values; row `zero` is almost nothing, as rows of tokens that were never trained are."""

        def make(rng: np.random.Generator, start: int, count: int) -> np.ndarray:
            values = rng.standard_normal(count, np.float32) * np.float32(std) + np.float32(mean)
            if zero is not None:
                width = math.prod(shape[1:])
                values[max(0, zero * width - start) : max(0, (zero + 1) * width - start)] *= np.float32(1e-5)
            return values.astype(NUMPY_DTYPES[dtype])

        return self._tensor(name, dtype, shape, make)

    def linear(self, name: str, rows: int, columns: int, dtype: str = "BF16") -> OutputTensor:
        """A matrix that keeps the size of what it is multiplied with."""
        return self.normal(name, (rows, columns), columns**-0.5, dtype)

    def fp8(self, name: str, rows: int, columns: int) -> OutputTensor:
        """FP8 values whose size the scales give back."""

        def make(rng: np.random.Generator, start: int, count: int) -> np.ndarray:
            values = rng.standard_normal(count, np.float32) * np.float32(_FP8_SPREAD)
            return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)

        return self._tensor(name, "F8_E4M3", (rows, columns), make)

    def fp8_scales(self, name: str, rows: int, columns: int, fan_in: int) -> OutputTensor:
        """Scales that differ from tile to tile, so that a tile taken for its neighbour shows."""

        def make(rng: np.random.Generator, start: int, count: int) -> np.ndarray:
            return (rng.uniform(0.5, 1.5, count) * fan_in**-0.5 / _FP8_SPREAD).astype(np.float32)

        return self._tensor(name, "F32", (rows, columns), make)

    def mxfp4(self, name: str, rows: int, columns: int) -> Iterator[OutputTensor]:
        """Codes drawn evenly, and scales about the power of two that fits."""
        exponent = round(math.log2(columns**-0.5 / _MXFP4_RMS))

        def codes(rng: np.random.Generator, start: int, count: int) -> np.ndarray:
            return rng.integers(0, 256, count, np.uint8)

        def scales(rng: np.random.Generator, start: int, count: int) -> np.ndarray:
            return rng.integers(126 + exponent, 129 + exponent, count, np.uint8)

        yield self._tensor(name, "U8", (rows, columns // 2), codes)
        yield self._tensor(f"{name}_scale", "U8", (rows, columns // BLOCK), scales)

    def _tensor(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        make: Callable[[np.random.Generator, int, int], np.ndarray],
    ) -> OutputTensor:
        elements = math.prod(shape)

        def produce() -> Iterator[np.ndarray]:
            rng = np.random.Generator(np.random.SFC64([self._seed, zlib.crc32(f"{self._salt}{name}".encode())]))
            for start in range(0, elements, _PIECE):
                yield make(rng, start, min(_PIECE, elements - start))

        return OutputTensor(name, dtype, shape, produce)


class _Backbone:
    """The tensors of a backbone's folder, in the order of its layers."""

    def __init__(self, config: BackboneConfig, preset: Preset, seed: int):
        self._config, self._hf, self._mtp_layers = config, preset.backbone, preset.mtp_layers
        self._mask = preset.drafter["dflash_config"]["mask_token_id"] if preset.drafter else None
        self._values = _Values(seed)
        self._experts = config.quantization.expert_format if config.quantization else None

    def tensors(self) -> Iterator[OutputTensor]:
        config, values = self._config, self._values
        vocab, hidden = config.vocab_size, config.hidden_size
        yield values.normal("model.embed_tokens.weight", (vocab, hidden), 1.0, zero=self._mask)
        for i, kind in enumerate(config.layers):
            yield from self._layer(f"model.layers.{i}.", kind)
        yield self._norm("model.norm.weight")
        # Four times the usual size makes some tokens much likelier than others.
        yield values.normal("lm_head.weight", (vocab, hidden), 4 * hidden**-0.5, zero=self._mask)
        for i in range(self._mtp_layers):
            yield from self._mtp(f"model.mtp.layers.{i}.")
        if self._hf.get("vision_config") is not None:
            yield values.linear("visual.blocks.0.attn.qkv.weight", 192, 64)
            yield values.linear("visual.patch_embed.proj.weight", 64, 48)
        if self._hf.get("audio_config") is not None:
            yield values.linear("audio_encoder.layers.0.self_attn.q_proj.weight", 64, 64, "F32")
            yield values.normal("speech_embeddings.0.weight", (32, 64), 1.0)

    def _layer(self, prefix: str, kind: LayerKind) -> Iterator[OutputTensor]:
        config, values, hidden = self._config, self._values, self._config.hidden_size
        yield self._norm(f"{prefix}input_layernorm.weight")
        yield from self._attention(prefix, kind)
        yield self._norm(f"{prefix}post_attention_layernorm.weight")
        if kind.mlp == "dense":
            yield from self._dense(f"{prefix}mlp.")
            return
        moe = config.moe
        router = "BF16" if self._hf.get("moe_router_dtype") == "bfloat16" else "F32"
        yield values.linear(f"{prefix}mlp.gate.weight", moe.experts, hidden, router)
        yield values.normal(f"{prefix}mlp.gate.e_score_correction_bias", (moe.experts,), 0.02, "F32")
        for e in range(moe.experts):
            expert = f"{prefix}mlp.experts.{e}."
            for name, rows, columns in (
                ("down_proj", hidden, moe.intermediate),
                ("gate_proj", moe.intermediate, hidden),
                ("up_proj", moe.intermediate, hidden),
            ):
                if self._experts == "mxfp4":
                    yield from values.mxfp4(f"{expert}{name}.weight", rows, columns)
                else:
                    yield from self._matrix(f"{expert}{name}.weight", rows, columns)

    def _attention(self, prefix: str, kind: LayerKind) -> Iterator[OutputTensor]:
        config, values, hidden = self._config, self._values, self._config.hidden_size
        sizes, chunks = config.attention(kind.attention), config.full.kv_heads
        rows = chunk_rows(sizes, chunks)
        # Every chunk was quantised by itself, whether or not its three parts were then put into tensors of their own.
        block = config.quantization.fp8_block[0] if config.quantization else 1
        tiles = tiles_of_chunk(rows, block)
        if config.fused_qkv:
            parts = [("qkv", sum(rows), sum(tiles))]
        else:
            parts = list(zip("qkv", rows, tiles, strict=True))
        for name, part_rows, part_tiles in parts:
            weight = f"{prefix}self_attn.{name}_proj.weight"
            yield from self._matrix(weight, chunks * part_rows, hidden, chunks * part_tiles)
        yield values.linear(f"{prefix}self_attn.o_proj.weight", hidden, sizes.heads * sizes.v_dim)
        if sizes.sink:
            yield values.normal(f"{prefix}self_attn.attention_sink_bias", (sizes.heads,), 1.0)

    def _dense(self, prefix: str) -> Iterator[OutputTensor]:
        hidden, inner = self._config.hidden_size, self._config.dense_intermediate
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            yield from self._matrix(f"{prefix}{name}_proj.weight", rows, columns)

    def _matrix(self, name: str, rows: int, columns: int, scale_rows: int | None = None) -> Iterator[OutputTensor]:
        """FP8 where the configuration has a quantisation, else BF16."""
        if self._config.quantization is None:
            yield self._values.linear(name, rows, columns)
            return
        row_block, column_block = self._config.quantization.fp8_block
        tiles = math.ceil(rows / row_block) if scale_rows is None else scale_rows
        yield self._values.fp8(name, rows, columns)
        yield self._values.fp8_scales(f"{name}_scale_inv", tiles, math.ceil(columns / column_block), columns)

    def _norm(self, name: str) -> OutputTensor:
        return self._values.normal(name, (self._config.hidden_size,), 0.1, mean=1.0)

    def _mtp(self, prefix: str) -> Iterator[OutputTensor]:
        hidden = self._config.hidden_size
        for name in ("enorm", "hnorm", "final_layernorm", "input_layernorm", "pre_mlp_layernorm"):
            yield self._norm(f"{prefix}{name}.weight")
        yield self._values.linear(f"{prefix}eh_proj.weight", hidden, 2 * hidden)
        yield from self._attention(prefix, LayerKind("swa", "dense"))
        yield from self._dense(f"{prefix}mlp.")


def drafter_outputs(config: DrafterConfig, seed: int) -> Iterator[OutputTensor]:
    """The tensors of a drafter's folder; values are made when they are written."""
    values = _Values(seed, "dflash/")
    hidden, inner, attention = config.hidden_size, config.intermediate, config.attention

    def norm(name: str, length: int = hidden) -> OutputTensor:
        return values.normal(f"{name}.weight", (length,), 0.1, mean=1.0)

    def linear(name: str, rows: int, columns: int) -> OutputTensor:
        return values.linear(f"{name}.weight", rows, columns)

    yield linear("fc", hidden, len(config.target_layer_ids) * hidden)
    yield norm("hidden_norm")
    for i in range(config.num_layers):
        prefix = f"layers.{i}."
        yield norm(f"{prefix}input_layernorm")
        yield linear(f"{prefix}self_attn.q_proj", attention.heads * attention.qk_dim, hidden)
        yield linear(f"{prefix}self_attn.k_proj", attention.kv_heads * attention.qk_dim, hidden)
        yield linear(f"{prefix}self_attn.v_proj", attention.kv_heads * attention.v_dim, hidden)
        yield linear(f"{prefix}self_attn.o_proj", hidden, attention.heads * attention.v_dim)
        yield norm(f"{prefix}self_attn.q_norm", attention.qk_dim)
        yield norm(f"{prefix}self_attn.k_norm", attention.qk_dim)
        if attention.sink:
            yield values.normal(f"{prefix}self_attn.attention_sink_bias", (attention.heads,), 1.0)
        yield norm(f"{prefix}post_attention_layernorm")
        yield linear(f"{prefix}mlp.gate_proj", inner, hidden)
        yield linear(f"{prefix}mlp.up_proj", inner, hidden)
        yield linear(f"{prefix}mlp.down_proj", hidden, inner)
    yield norm("norm")
