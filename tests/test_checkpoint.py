"""From stored tensors to parameters: goldens bit for bit, every row order and storage, and what is refused."""

import json
import logging
import math
import os
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mimo_jax.checkpoint import BackboneCheckpoint, DrafterCheckpoint
from mimo_jax.config import BackboneConfig, DrafterConfig
from mimo_jax.presets import PRESETS, Preset
from mimo_jax.qkv_layout import QkvLayout, fused_rows, fused_scale_rows, split_rows
from mimo_jax.quantization import FP8BlockWeight, MXFP4Weight, dequantize
from mimo_jax.safetensors_reader import DTYPE_BITS, CheckpointError, CheckpointFolder, OpenFile, SafetensorsFile
from mimo_jax.synthesize import backbone_outputs, synthesize
from mimo_jax.torch_sidecar import write_mask_embedding
from sharding.topology import Topology
from tests.checkpoint_files import (
    MICRO,
    Tensor,
    assert_same,
    declared_backbone,
    declared_drafter,
    edit,
    read_tensors,
    write_folder,
)
from tests.conftest import golden_folders, golden_id

EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
OUTPUT = "model.layers.0.self_attn.o_proj.weight"
QKV = "model.layers.1.self_attn.qkv_proj.weight"


def load(folder, dtype="float32", *, layout: QkvLayout = "auto", **settings):
    config = BackboneConfig.from_folder(folder)
    return BackboneCheckpoint(folder, config, layout).load(declared_backbone(config, dtype), **settings)


def is_weight(value):
    return isinstance(value, MXFP4Weight | FP8BlockWeight)


def expand(params, dtype="float32"):
    """Packed parameters, with what is packed decoded."""
    return jax.tree.map(lambda w: dequantize(w, dtype) if is_weight(w) else w, params, is_leaf=is_weight)


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "micro"
    synthesize(MICRO, folder, seed=7)
    return folder


@pytest.fixture
def tensors(micro):
    return read_tensors(micro)


def save(folder, tensors, metadata=None, **config):
    if metadata is None:
        metadata = {"tp_size": 2}
    return write_folder(folder, MICRO.backbone | config, tensors, metadata)


def refused(folder, *messages, layout: QkvLayout = "auto"):
    with pytest.raises(CheckpointError) as raised:
        BackboneCheckpoint(folder, BackboneConfig.from_folder(folder), layout)
    for message in messages:
        assert message in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "folder",  # the repository's own copy has no samples
    [f for f in golden_folders("backbone_tiny_mxfp4") if (f / "dequantized_samples.safetensors").exists()],
    ids=golden_id,
)
def test_golden_dequantized_samples(folder):
    params = load(folder, storage="expanded")["layers"]
    config = BackboneConfig.from_folder(folder)
    samples = SafetensorsFile(folder / "dequantized_samples.safetensors").tensors
    assert len(samples) >= 2
    for name, sample in samples.items():
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        kind = config.layers[int(layer)]
        row, leaves = config.layers_of(kind).index(int(layer)), params[kind.name]
        if "qkv_proj" in rest:
            got = np.concatenate([leaves["attention"][part][row] for part in "qkv"])
        elif "experts" in rest:
            _, _, expert, projection, _ = rest.split(".")
            if projection == "down_proj":
                got = leaves["mlp"]["down"][row, int(expert)]
            else:
                got = leaves["mlp"]["gate_up"][row, int(expert), int(projection == "up_proj")]
        else:
            got = leaves["mlp"][rest.split(".")[1].removesuffix("_proj")][row]
        np.testing.assert_array_equal(np.asarray(got).view(np.uint32), sample.read().view(np.uint32), err_msg=name)


@pytest.mark.parametrize("folder", golden_folders("backbone_tiny_mxfp4"), ids=golden_id)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_is_expanded_after_dequantizing(folder, dtype):
    packed, expanded = load(folder, dtype), load(folder, dtype, storage="expanded")
    mlp = packed["layers"]["swa_moe"]["mlp"]
    assert isinstance(mlp["gate_up"], MXFP4Weight)
    assert isinstance(mlp["down"], MXFP4Weight)
    assert isinstance(packed["layers"]["swa_moe"]["attention"]["v"], FP8BlockWeight)
    assert isinstance(packed["layers"]["full_dense"]["mlp"]["down"], FP8BlockWeight)
    assert_same(expand(packed, dtype), expanded)


@pytest.mark.parametrize(
    "folder",  # the repository's own copy has one order
    [f for f in golden_folders("backbone_tiny_fused_qkv") if (f / "canonical_concat").is_dir()],
    ids=golden_id,
)
def test_both_row_orders_give_the_same_parameters(folder):
    chunked = load(folder / "tp_interleaved")
    canonical = load(folder / "canonical_concat", layout="canonical")
    assert_same(chunked, canonical)
    [split] = [f for f in golden_folders("backbone_tiny_f32") if f.parent == folder.parent]
    assert_same(chunked, load(split))
    refused(folder / "canonical_concat", "--qkv-layout chunked or --qkv-layout canonical")
    with pytest.raises(AssertionError):
        assert_same(canonical, load(folder / "canonical_concat", layout="chunked"))


@pytest.mark.parametrize("folder", golden_folders("backbone_tiny_*") + golden_folders("dflash_tiny"), ids=golden_id)
def test_progress_adds_up(folder):
    for name in ("tp_interleaved", "target", ""):
        if (folder / name / "config.json").exists():
            config = BackboneConfig.from_folder(folder / name)
            checkpoint = BackboneCheckpoint(folder / name, config)
            for storage in ("packed", "expanded"):
                told: list[int] = []
                declared = declared_backbone(config)
                checkpoint.load(declared, storage=storage, progress=told.append)
                assert sum(told) == checkpoint.total_bytes == checkpoint.read_bytes(declared, storage)
            assert checkpoint.total_bytes <= checkpoint.summary.nbytes


@pytest.mark.parametrize("folder", golden_folders("dflash_tiny"), ids=golden_id)
@pytest.mark.parametrize("name", ["drafter_random", "drafter_mimo", "drafter_plain"])
def test_golden_drafters(folder, name):
    config = DrafterConfig.from_folder(folder / name)
    params = DrafterCheckpoint(folder / name, config).load(declared_drafter(config, "bfloat16"))
    stored = read_tensors(folder / name)
    q = np.stack([stored[f"layers.{i}.self_attn.q_proj.weight"].array(ml_dtypes.bfloat16) for i in range(3)])
    np.testing.assert_array_equal(np.asarray(params["attention"]["q"]), q)
    copy = SafetensorsFile(folder / name / "mask_embedding_copy.safetensors").tensors["embedding"].read()
    np.testing.assert_array_equal(np.asarray(params["mask_embedding"]), copy)
    assert ("sink" in params["attention"]) == config.attention.sink


def test_the_release_by_its_shapes():
    preset = PRESETS["mimo-v2.5-pro"]
    config = BackboneConfig.from_hf(preset.backbone)
    shapes = declared_backbone(config, "bfloat16").shapes
    count = {k: sum(math.prod(s.shape) for s in jax.tree.leaves(v)) for k, v in shapes.items()}
    assert sum(count.values()) == 1_021_248_126_336
    assert count["embedding"] == count["lm_head"] == 937_426_944
    kinds = shapes["layers"].values()

    def total(*names):
        leaves = [(path, leaf) for kind in kinds for path, leaf in jax.tree.leaves_with_path(kind)]
        return sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key in names)

    assert total("q", "k", "v") == 11_670_650_880
    assert total("o") == 7_046_430_720
    assert total("sink") == 7_680
    assert total("router") == 162_791_424
    assert total("correction_bias") == 26_496
    experts = [kind["mlp"] for kind in kinds if "router" in kind["mlp"]]
    assert sum(math.prod(m[n].shape) for m in experts for n in ("gate_up", "down")) == 1_000_190_509_056

    assert preset.drafter is not None
    drafter = declared_drafter(DrafterConfig.from_hf(preset.drafter), "bfloat16").shapes
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(drafter)) == 2_768_316_288 + 6144  # and the mask vector
    stacked = sum(5 if s.shape[0] == 5 else 1 for s in jax.tree.leaves(drafter))
    assert stacked == 63 + 1


def test_row_maps_of_the_release():
    attention = BackboneConfig.from_hf(PRESETS["mimo-v2.5-pro"].backbone).full
    assert fused_scale_rows(attention, 8, 128) == (216, 212)
    q, k, v = fused_rows(attention, 8, 128, True)
    assert [m.tile for m in (q, k, v)] == [128, 64, 64]
    assert q.runs(0, 24576) == [(c * 3072, c * 3392, 3072) for c in range(8)]
    assert k.scale[:192].tolist() == [24] * 128 + [25] * 64
    assert v.scale[:128].tolist() == [25] * 64 + [26] * 64
    assert v.scale[128 * 7] == 7 * 27 + 25
    assert k.runs(100, 300) == [(100, 3172, 92), (192, 3392 + 3072, 108)]


def test_row_maps_of_v2_flash():
    config = BackboneConfig.from_hf(PRESETS["mimo-v2-flash"].backbone)
    fitting = split_rows(config.full, 4, 128, (96, 8, 4))
    assert fitting is not None
    (q, k, v), shared = fitting
    assert shared
    assert q.scale.tolist() == [r // 128 for r in range(12288)]
    assert k.scale[:192].tolist() == [96] * 128 + [97] * 64
    assert v.scale[:128].tolist() == [97] * 64 + [104] * 64
    assert v.scale[128:256].tolist() == [99] * 64 + [105] * 64
    regular = split_rows(config.swa, 4, 128, (96, 12, 8))
    assert regular is not None
    assert not regular[1]
    assert split_rows(config.full, 4, 128, (96, 8, 5)) is None


FLASH = MICRO.backbone | {
    "attention_projection_layout": "split",
    "head_dim": 96,
    "swa_head_dim": 96,
    "v_head_dim": 64,
    "swa_v_head_dim": 64,
    "num_attention_heads": 8,
    "swa_num_attention_heads": 8,
}


@pytest.mark.parametrize("block", [[128, 128], [64, 256], [80, 128], [128, 48]])
def test_split_scales_computed_on_chunks(tmp_path, block):
    quantization = MICRO.backbone["quantization_config"] | {"weight_block_size": block}
    preset = Preset(FLASH | {"hidden_size": 160, "quantization_config": quantization}, None, mtp_layers=0)
    synthesize(preset, tmp_path / "x", seed=3)
    config, tensors = BackboneConfig.from_folder(tmp_path / "x"), read_tensors(tmp_path / "x")
    got = load(tmp_path / "x", storage="expanded")["layers"]
    for layer, kind in enumerate(config.layers):
        prefix, sizes = f"model.layers.{layer}.self_attn.", config.attention(kind.attention)
        heads = sizes.kv_heads // 2
        rows = (sizes.heads // 2 * sizes.qk_dim, heads * sizes.qk_dim, heads * sizes.v_dim)
        ends = [math.ceil(sum(rows[: i + 1]) / block[0]) for i in range(3)]
        owned = (ends[0], ends[1] - ends[0], ends[2] - ends[1])
        values = [tensors[f"{prefix}{p}_proj.weight"].array(ml_dtypes.float8_e4m3fn) for p in "qkv"]
        scales = [tensors[f"{prefix}{p}_proj.weight_scale_inv"].array(np.float32) for p in "qkv"]
        expected: list[list[np.ndarray]] = [[], [], []]
        for c in range(2):  # put the chunk together again and decode it as one
            chunk = np.concatenate([v[c * r : (c + 1) * r] for v, r in zip(values, rows, strict=True)])
            tiles = np.concatenate([s[c * n : (c + 1) * n] for s, n in zip(scales, owned, strict=True)])
            scale = np.repeat(np.repeat(tiles, block[0], 0)[: len(chunk)], block[1], 1)[:, :160]
            decoded = np.split(chunk.astype(np.float32) * scale, np.cumsum(rows)[:2])
            for parts, part in zip(expected, decoded, strict=True):
                parts.append(part)
        attention, row = got[kind.name]["attention"], config.layers_of(kind).index(layer)
        for name, parts in zip("qkv", expected, strict=True):
            np.testing.assert_array_equal(attention[name][row], np.concatenate(parts), err_msg=f"{layer} {name}")
    if block[1] % 128:
        with pytest.raises(CheckpointError, match="expanded storage"):
            load(tmp_path / "x")
    else:
        assert_same(expand(load(tmp_path / "x")), load(tmp_path / "x", storage="expanded"))


def reference_qkv(tensors, config, layer, chunks, block=128):
    """q, k, v of a chunked fused tensor, decoded row by row."""
    sizes = config.attention(config.layers[layer].attention)
    values = tensors[f"model.layers.{layer}.self_attn.qkv_proj.weight"].array(ml_dtypes.float8_e4m3fn)
    scales = tensors[f"model.layers.{layer}.self_attn.qkv_proj.weight_scale_inv"].array(np.float32)
    length = len(values) // chunks
    decoded = np.empty(values.shape, np.float32)
    for r in range(len(values)):
        tile = r // length * math.ceil(length / block) + r % length // block
        decoded[r] = values[r].astype(np.float32) * np.repeat(scales[tile], 128)[: values.shape[1]]
    q, k = sizes.heads // chunks * sizes.qk_dim, sizes.kv_heads // chunks * sizes.qk_dim
    parts = [np.split(d, [q, q + k]) for d in np.split(decoded, chunks)]
    return [np.concatenate([p[i] for p in parts]) for i in range(3)]


@pytest.mark.parametrize("preset", ["tiny", MICRO], ids=["tiny", "micro"])
def test_fused_scales_start_afresh_in_every_chunk(tmp_path, preset):
    synthesize(preset, tmp_path / "x", seed=3)
    config, tensors = BackboneConfig.from_folder(tmp_path / "x"), read_tensors(tmp_path / "x")
    params = load(tmp_path / "x", storage="expanded")["layers"]
    for layer, kind in enumerate(config.layers):
        row = config.layers_of(kind).index(layer)
        for name, expected in zip("qkv", reference_qkv(tensors, config, layer, 2), strict=True):
            np.testing.assert_array_equal(params[kind.name]["attention"][name][row], expected)


def test_scale_rows_prove_chunks_without_metadata(tmp_path):
    synthesize("tiny", tmp_path / "x", seed=3)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    with_metadata = load(tmp_path / "x")
    assert index["metadata"].pop("tp_size") == 2
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load(tmp_path / "x"), with_metadata)
    refused(tmp_path / "x", "rows of scales", layout="canonical")


def test_a_continuous_grid_proves_nothing(tmp_path, tensors):
    """A tensor of 176 rows has two rows of scales in either layout, so which it is must be said."""
    config = BackboneConfig.from_hf(MICRO.backbone)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors |= {f"{name}_scale_inv": Tensor.of("F32", np.array([[0.5], [2.0]], np.float32))}
    folder = save(tmp_path / "a", tensors, {})
    refused(folder, "--qkv-layout")
    values = tensors[name].array(ml_dtypes.float8_e4m3fn).astype(np.float32)
    orders: list[tuple[QkvLayout, int]] = [("canonical", 128), ("chunked", 88)]
    for layout, rows in orders:
        scales = np.repeat(np.array([0.5, 2.0], np.float32), rows)[:176, None]
        attention = load(folder, layout=layout, storage="expanded")["layers"]["full_dense"]["attention"]
        q = values * scales
        q = q[: config.full.heads * 24] if layout == "canonical" else np.concatenate([q[:48], q[88:136]])
        np.testing.assert_array_equal(attention["q"][0], q)


def test_metadata_that_contradicts(tmp_path, tensors):
    for value in (4, "x", 2.0, True, [2], "²", "9" * 5000):
        message = refused(save(tmp_path / "x", tensors, {"tp_size": value}), "tp_size", "num_key_value_heads (2)")
        assert len(message) < 1000
        shutil.rmtree(tmp_path / "x")
    assert_same(load(save(tmp_path / "x", tensors, {"tp_size": "2"})), load(save(tmp_path / "y", tensors)))


def test_single_file_carries_metadata_in_its_header(tmp_path, micro, tensors):
    folder = save(tmp_path / "x", tensors)
    [file] = folder.glob("*.safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length]) | {"__metadata__": {"tp_size": "2"}}
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])
    file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    assert_same(load(folder), load(micro))


def test_plain_weights_of_any_float(tmp_path, tensors, rng):
    config = BackboneConfig.from_hf(MICRO.backbone)
    params = {}
    for dtype, name in ((np.float32, "F32"), (np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")):
        values = rng.standard_normal((64, config.full.heads * config.full.v_dim)).astype(dtype)
        changed = tensors | {"model.layers.0.self_attn.o_proj.weight": Tensor.of(name, values)}
        for wanted in ("float32", "bfloat16"):
            params = load(save(tmp_path / f"{name}-{wanted}", changed), wanted)
            got = np.asarray(params["layers"]["full_dense"]["attention"]["o"])[0]
            np.testing.assert_array_equal(got, values.astype(np.float32).astype(got.dtype))
    assert params["layers"]["swa_moe"]["mlp"]["router"].dtype == np.float32


def test_a_stack_of_several_formats(tmp_path, tensors, caplog, rng):
    """Two dense layers, one FP8 and one BF16: no stack can stay packed, and the reason is told."""
    synthesize(Preset(MICRO.backbone | {"moe_layer_freq": [0, 1, 0]}, None, 0), tmp_path / "x", seed=1)
    tensors = read_tensors(tmp_path / "x")
    name = "model.layers.2.mlp.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    tensors[name] = Tensor.of("BF16", rng.standard_normal((96, 64)).astype(ml_dtypes.bfloat16))
    folder = save(tmp_path / "y", tensors, moe_layer_freq=[0, 1, 0])
    with caplog.at_level(logging.WARNING):
        params = load(folder)
    assert "layers/full_dense/mlp/up is stored as fp8 and plain in different layers: it is expanded" in caplog.text
    mlp = params["layers"]["full_dense"]["mlp"]
    assert isinstance(mlp["gate"], FP8BlockWeight)
    assert_same(expand(params), load(folder, storage="expanded"))


def test_experts_of_several_formats(tmp_path, tensors, rng):
    del tensors[f"{EXPERT}_scale"]
    tensors[EXPERT] = Tensor.of("BF16", rng.standard_normal((32, 64)).astype(ml_dtypes.bfloat16))
    folder = save(tmp_path / "x", tensors)
    with pytest.raises(CheckpointError, match=r"mxfp4 and plain.*expanded storage"):
        load(folder)
    got = load(folder, storage="expanded")["layers"]["swa_moe"]["mlp"]["gate_up"][0, 0, 1]
    np.testing.assert_array_equal(got, tensors[EXPERT].array(ml_dtypes.bfloat16).astype(np.float32))


def test_fp8_experts_stay_packed(tmp_path):
    quantization = MICRO.backbone["quantization_config"] | {"store_dtype": "fp8"}
    synthesize(Preset(MICRO.backbone | {"quantization_config": quantization}, None, 0), tmp_path / "x")
    packed = load(tmp_path / "x")
    assert packed["layers"]["swa_moe"]["mlp"]["gate_up"].scales.shape == (1, 4, 2, 1, 1)
    assert_same(expand(packed), load(tmp_path / "x", storage="expanded"))


def test_unquantised_checkpoint(tmp_path):
    config = {k: v for k, v in MICRO.backbone.items() if k != "quantization_config"}
    synthesize(Preset(config, None, 0), tmp_path / "x")
    assert not any(is_weight(w) for w in jax.tree.leaves(load(tmp_path / "x"), is_leaf=is_weight))
    folder = save(tmp_path / "y", read_tensors(tmp_path / "x"), {}, quantization_config=None)
    refused(folder, "--qkv-layout")


def with_a_scale_for_every_row(params):
    """FP8 weights whose scales do not show how many rows share one: devices share none, so tiles may be smaller."""

    def spread(weight):
        if not isinstance(weight, FP8BlockWeight):
            return weight
        rows = weight.values.shape[-2] // weight.scales.shape[-2]
        return FP8BlockWeight(weight.values, jnp.asarray(np.repeat(np.asarray(weight.scales), rows, axis=-2)))

    return jax.tree.map(spread, params, is_leaf=lambda w: isinstance(w, FP8BlockWeight))


@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_any_sharding_gives_the_same_parameters(micro, storage):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    rules = {
        "expert": "data",
        "expert_inner": "tensor",
        "heads": "tensor",
        "mlp": "tensor" if storage == "expanded" else None,  # 24 columns would cut a tile of FP8 scales
        "vocab": ("data", "tensor"),
    }
    cut, uncut = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P(None, None, "tensor"), jax.P()))
    with pytest.raises(CheckpointError, match="24 of 96 columns on a device would cut tiles of 128 FP8 columns"):
        load(micro, sharding=lambda axes, shape: cut if axes == ("layers", "embed", "mlp") else uncut)
    asked = []

    def sharding(axes, shape):
        asked.append((axes, shape))
        parts = [rules.get(axis) for axis in axes]
        sizes = {"data": 2, "tensor": 4, ("data", "tensor"): 8, None: 1}
        spec = [p if n % sizes[p] == 0 else None for p, n in zip(parts, shape, strict=True)]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    sharded, whole = load(micro, storage=storage, sharding=sharding), load(micro, storage=storage)
    assert_same(*map(with_a_scale_for_every_row, (sharded, whole)))
    down = sharded["layers"]["swa_moe"]["mlp"]["down"]
    down = down.codes if storage == "packed" else down
    assert down.addressable_shards[0].data.shape == (1, 2, 64, down.shape[-1] // 4)
    stored = (1, 4, 2, 32, 32 if storage == "packed" else 64)
    assert (("layers", "expert", "gate_up", "expert_inner", "embed"), stored) in asked


@pytest.mark.parametrize("spec", [(), (None, "x"), (None, None, None, "x"), (None, None, None, None, "x")])
def test_every_byte_is_read_once(micro, monkeypatch, spec):
    """Devices that own different experts or rows read only those; those that own the same rows share one reading."""
    config, count = BackboneConfig.from_folder(micro), [0]
    checkpoint = BackboneCheckpoint(micro, config)
    pread = OpenFile.pread

    def counting(self, out, offset):
        count[0] += len(out)
        pread(self, out, offset)

    def sharding(axes, shape):
        cut = axes[1:3] == ("expert", "gate_up") and (len(spec) < 5 or shape[-1] % 4 == 0)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(spec if cut else ())))

    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    monkeypatch.setattr(OpenFile, "pread", counting)
    checkpoint.load(declared_backbone(config), sharding=sharding)
    monkeypatch.undo()
    scales = sum(t.nbytes for t in CheckpointFolder(micro).tensors.values() if t.name.endswith("_scale_inv"))
    assert checkpoint.total_bytes <= count[0] <= checkpoint.total_bytes + 3 * scales  # q, k and v each read theirs


TWO_GROUPS = Topology(4, 2, 4, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1)
"""As the release on two nodes: a node has half the experts and all of the rest."""
ONE_GROUP = Topology(4)
"""A node has half the heads, half of every expert and half the vocabulary."""


def share_of_two_groups(name, expert):
    return 1 if expert is None else int(expert < 2)


def share_of_one_group(name, expert):
    by_rows = ("q_proj", "k_proj", "v_proj", "sink_bias", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    return 1 / 2 if any(part in name for part in by_rows) else 1  # o and down are cut by columns: rows are whole


@pytest.mark.parametrize(
    ("topology", "share"), [(TWO_GROUPS, share_of_two_groups), (ONE_GROUP, share_of_one_group)], ids=["groups", "one"]
)
def test_a_process_reads_the_rows_that_its_devices_own(tmp_path, monkeypatch, topology, share):
    """What it asks the files for is what progress counts, and what the names of the tensors say."""
    more = {"num_key_value_heads": 4, "quantization_config": None, "attention_projection_layout": "split"}
    synthesize(Preset({k: v for k, v in (MICRO.backbone | more).items() if v is not None}, None, 0), tmp_path / "x")
    config = BackboneConfig.from_folder(tmp_path / "x")
    checkpoint, mesh = BackboneCheckpoint(tmp_path / "x", config), topology.mesh()
    arrays, asked, told = [], [], []
    pread, places = OpenFile.pread, jax.sharding.NamedSharding.addressable_devices_indices_map

    def counting(self, out, offset):
        asked.append(len(out))
        pread(self, out, offset)

    def kept(shape, sharding, placed):
        arrays.append((shape, sharding, placed))
        return len(arrays) - 1  # stands for the array in the parameters

    def of_first_two(self, global_shape):
        return dict(list(places(self, global_shape).items())[:2])

    def sharding(axes, shape):
        return topology.sharding(mesh, axes, shape)

    monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", of_first_two)
    monkeypatch.setattr(OpenFile, "pread", counting)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", kept)
    declared = declared_backbone(config)
    loaded = checkpoint.load(declared, sharding=sharding, progress=told.append)
    expected = 0.0
    for tensor in checkpoint.tensors:
        expert = re.search(r"experts\.(\d+)\.", tensor.name)
        expected += tensor.nbytes * share(tensor.name, expert and int(expert[1]))
    assert sum(asked) == sum(told) == checkpoint.read_bytes(declared, "packed", sharding) == expected
    monkeypatch.undo()
    whole = checkpoint.load(declared)
    assert jax.tree.structure(loaded) == jax.tree.structure(whole)
    for number, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(whole), strict=True):
        shape, where, placed = arrays[number]
        assert shape == expected.shape
        assert len(placed) == 2
        for array in placed:
            [device] = array.devices()
            index = where.addressable_devices_indices_map(shape)[device]
            np.testing.assert_array_equal(array, np.asarray(expected)[index])


def test_a_file_that_shrinks_while_it_is_read(tmp_path, micro):
    shutil.copytree(micro, tmp_path / "x")
    config = BackboneConfig.from_folder(tmp_path / "x")
    checkpoint = BackboneCheckpoint(tmp_path / "x", config)
    [file] = (tmp_path / "x").glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="too early"):
        checkpoint.load(declared_backbone(config))


def test_the_wrong_module_is_refused(micro):
    config = BackboneConfig.from_folder(micro)
    other = BackboneConfig.from_hf(MICRO.backbone | {"vocab_size": 300})
    with pytest.raises(ValueError, match="another configuration"):
        BackboneCheckpoint(micro, config).load(declared_backbone(other))


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda t: t.pop("model.norm.weight"), ["1 missing: model.norm.weight"]),
        (lambda t: t.pop(EXPERT), [f"missing: {EXPERT}", f"unexpected: {EXPERT}_scale"]),
        (lambda t: t.pop(f"{EXPERT}_scale"), [f"missing: {EXPERT}_scale"]),
        (lambda t: t.pop(f"{QKV}_scale_inv"), [f"missing: {QKV}_scale_inv"]),
        (lambda t: t.pop("model.layers.1.self_attn.attention_sink_bias"), ["missing", "attention_sink_bias"]),
        (lambda t: [t.pop(n) for n in list(t) if ".experts.3." in n], ["6 missing: "]),
        (lambda t: t.update({"model.layers.0.self_attn.attention_sink_bias": t["model.norm.weight"]}), ["unexpected"]),
        (lambda t: t.update({"model.layers.3.input_layernorm.weight": t["model.norm.weight"]}), ["unexpected"]),
        (lambda t: t.update({"model.mtp_norm.weight": t["model.norm.weight"]}), ["unexpected: model.mtp_norm.weight"]),
        (lambda t: t.update({"x.model.mtp.a": t["model.norm.weight"]}), ["unexpected: x.model.mtp.a"]),
        (lambda t: t.update(edit(t, "model.norm.weight", dtype="U8", shape=(128,))), ["expected dtype BF16"]),
        (lambda t: t.update(edit(t, "model.norm.weight", shape=(2, 32))), ["expected shape [64]"]),
        (lambda t: t.update(edit(t, "model.norm.weight", shape=(1, 64))), ["expected shape [64]"]),
        (lambda t: t.update(edit(t, "model.embed_tokens.weight", shape=(64, 272))), ["expected shape [272, 64]"]),
        (lambda t: t.update(edit(t, "model.embed_tokens.weight", dtype="I16")), ["expected dtype"]),
        (lambda t: t.update(edit(t, QKV, dtype="U8")), ["missing: model.layers.1.self_attn.qkv_proj.weight_scale"]),
        (lambda t: t.update(edit(t, QKV, dtype="F8_E5M2")), ["no known way to store a weight"]),
        (lambda t: t.update(edit(t, QKV, dtype="I8")), ["no known way to store a weight"]),
        (lambda t: t.update(edit(t, f"{QKV}_scale_inv", shape=(1, 2))), ["expected shape [1, 1]"]),
        (lambda t: t.update(edit(t, f"{QKV}_scale_inv", shape=(3, 1))), ["expected 2 rows of scales"]),
        (lambda t: t.update(edit(t, f"{QKV}_scale_inv", shape=())), ["weight_scale_inv"]),
        (lambda t: t.update(edit(t, f"{QKV}_scale_inv", dtype="I32")), ["expected dtype F32"]),
        (lambda t: t.update({f"{QKV}_scale": t[f"{QKV}_scale_inv"]}), ["nothing else"]),
        (
            lambda t: t.update({f"{OUTPUT}_scale_inv": t[f"{QKV}_scale_inv"]}),
            ["has a scale"],
        ),
        (
            lambda t: t.update({"model.norm.weight_scale": t[f"{EXPERT}_scale"]}),
            ["unexpected: model.norm.weight_s"],
        ),
        (lambda t: t.update(edit(t, EXPERT, shape=(64, 16))), ["expected shape [32, 32]"]),
        (lambda t: t.update(edit(t, f"{EXPERT}_scale", shape=(2, 32))), ["expected shape [32, 2]"]),
        (lambda t: t.update({f"{EXPERT}_scale_inv": t[f"{EXPERT}_scale"]}), ["nothing else"]),
        (lambda t: t.update({f"{EXPERT}_scale_inv": t.pop(f"{EXPERT}_scale")}), ["missing", "nothing else"]),
    ],
)
def test_damage_is_refused_before_data_is_read(tmp_path, tensors, change, messages):
    change(tensors)
    tensors = {n: t if _size_fits(t) else Tensor(t.dtype, t.shape, bytes(_size(t))) for n, t in tensors.items()}
    refused(save(tmp_path / "x", tensors), str(tmp_path / "x"), *messages)


def _size(tensor):
    return DTYPE_BITS[tensor.dtype] * math.prod(tensor.shape) // 8


def _size_fits(tensor):
    return len(tensor.data) == _size(tensor)


def test_all_faults_are_told_at_once(tmp_path, tensors):
    tensors["what.is.this"] = tensors.pop("model.norm.weight")
    message = refused(save(tmp_path / "x", edit(tensors, "lm_head.weight", dtype="I16")))
    for expected in ("missing: model.norm.weight", "unexpected: what.is.this", "lm_head.weight (I16"):
        assert expected in message


def test_fp8_needs_a_quantisation_config(tmp_path, tensors):
    refused(save(tmp_path / "x", tensors, quantization_config=None), "no quantization_config")


def test_configuration_of_another_model(micro):
    huge = {"n_routed_experts": 2**31 - 1, "num_experts_per_tok": 2}
    config = BackboneConfig.from_hf(MICRO.backbone | huge)
    with pytest.raises(CheckpointError, match="missing"):
        BackboneCheckpoint(micro, config)


def test_heads_that_do_not_fit_the_chunks(tmp_path, tensors):
    rows = {0: 4 * 24 + 4 * 24 + 4 * 16, 1: 4 * 24 + 2 * 24 + 2 * 16, 2: 4 * 24 + 4 * 24 + 4 * 16}
    for layer, count in rows.items():
        name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
        tensors.pop(f"{name}_scale_inv")
        tensors[name] = Tensor("BF16", (count, 64), bytes(count * 128))
    config = {"num_key_value_heads": 4, "swa_num_key_value_heads": 2}
    refused(save(tmp_path / "y", tensors, {"tp_size": 4}, **config), "multiples of that many heads")
    assert load(save(tmp_path / "z", tensors, {}, **config), layout="canonical")


def test_mxfp4_needs_whole_blocks(tmp_path, tensors):
    refused(save(tmp_path / "x", tensors, moe_intermediate_size=48), "multiple of 32 columns")


@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_scales_that_are_no_numbers(tmp_path, tensors, storage):
    data = bytearray(tensors[f"{EXPERT}_scale"].data)
    data[-1] = 255
    folder = save(tmp_path / "x", edit(tensors, f"{EXPERT}_scale", data=bytes(data)))
    with pytest.raises(CheckpointError, match=r"model-.*up_proj\.weight_scale: a scale byte is 255"):
        load(folder, storage=storage)
    scales = tensors[f"{QKV}_scale_inv"].array(np.float32).copy()
    scales[0, 0] = np.inf
    folder = save(tmp_path / "y", tensors | {f"{QKV}_scale_inv": Tensor.of("F32", scales)})
    with pytest.raises(CheckpointError, match="not a finite number"):
        load(folder, storage=storage)


def test_e8m0_is_a_byte_too(tmp_path, micro, tensors):
    changed = {n: Tensor("F8_E8M0", t.shape, t.data) if n.endswith("_scale") else t for n, t in tensors.items()}
    assert_same(load(save(tmp_path / "x", changed)), load(micro))


def test_decoys_are_skipped_whatever_they_are(tmp_path, micro, tensors):
    for name in (
        "model.mtp.layers.0.self_attn.q_proj.weight",
        "visual.blocks.0.attn.qkv.weight",
        "vision_model.x",
        "audio_encoder.layers.0.self_attn.q_proj.weight",
        "audio_tokenizer/model.norm.weight",
        "speech_embeddings.0.weight",
        "dflash/fc.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.cos_cached",
        "model.rotary_emb.sin_cached",
    ):
        tensors[name] = Tensor("C64", (1, 0, 3), b"")
    folder = save(tmp_path / "x", tensors)
    assert_same(load(folder), load(micro))
    skipped = BackboneCheckpoint(folder, BackboneConfig.from_folder(folder)).summary.skipped
    assert {p.name for p in skipped} == {"mtp", "vision", "audio", "drafter", "rotary caches"}


def test_summary_counts_everything(micro, tensors):
    summary = BackboneCheckpoint(micro, BackboneConfig.from_folder(micro)).summary
    parts = [*summary.parts, *summary.skipped]
    assert sum(p.tensors for p in parts) == len(tensors)
    assert sum(p.nbytes for p in parts) == sum(len(t.data) for t in tensors.values())
    shapes = declared_backbone(BackboneConfig.from_folder(micro)).shapes
    assert summary.parameters == sum(math.prod(s.shape) for s in jax.tree.leaves(shapes))
    assert {p.name: p.dtypes for p in parts}["experts"] == ("U8",)


@pytest.fixture
def drafter(micro, tmp_path):
    shutil.copytree(micro / "dflash", tmp_path / "dflash")
    return tmp_path / "dflash"


def load_drafter(folder):
    config = DrafterConfig.from_folder(folder)
    return DrafterCheckpoint(folder, config).load(declared_drafter(config, "bfloat16"))


def rewrite(folder, tensors):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    return write_folder(folder, config, tensors)


def test_drafter_names_with_a_prefix(drafter):
    plain, tensors = load_drafter(drafter), read_tensors(drafter)
    assert_same(load_drafter(rewrite(drafter, {f"model.{n}": t for n, t in tensors.items()})), plain)
    with pytest.raises(CheckpointError, match=r"with and without.*fc"):
        load_drafter(rewrite(drafter, tensors | {"model.fc.weight": tensors["fc.weight"]}))


def test_drafter_mask_vector_in_safetensors(drafter):
    plain, tensors = load_drafter(drafter), read_tensors(drafter)
    mask = Tensor.of("BF16", np.asarray(plain["mask_embedding"]))
    assert_same(load_drafter(rewrite(drafter, tensors | {"mask_embedding": mask})), plain)
    (drafter / "mask_embedding.pt").unlink()
    assert_same(load_drafter(drafter), plain)
    rewrite(drafter, tensors)
    with pytest.raises(CheckpointError, match="no mask vector"):
        load_drafter(drafter)
    safetensors.numpy.save_file({"embedding": mask.array(ml_dtypes.bfloat16)}, drafter / "mask_embedding_x.safetensors")
    assert_same(load_drafter(drafter), plain)
    other = {"embedding": mask.array(ml_dtypes.bfloat16) * 2}
    safetensors.numpy.save_file(other, drafter / "mask_embedding_y.safetensors")
    with pytest.raises(CheckpointError, match="different mask vectors"):
        load_drafter(drafter)
    safetensors.numpy.save_file({"embedding": np.zeros(3, np.float32)}, drafter / "mask_embedding_y.safetensors")
    with pytest.raises(CheckpointError, match="one float tensor"):
        load_drafter(drafter)


def test_drafter_mask_vector_of_another_token(drafter):
    write_mask_embedding(drafter / "mask_embedding.pt", 7, np.zeros(64, ml_dtypes.bfloat16))
    with pytest.raises(CheckpointError, match=r"vector of token 7, but mask_token_id in config.json is 265"):
        load_drafter(drafter)


@pytest.mark.parametrize("name", ["fc.weight", "layers.1.mlp.down_proj.weight", "layers.0.self_attn.k_norm.weight"])
def test_drafter_damage(drafter, name):
    tensors = read_tensors(drafter)
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != name}, f"missing: {name}"),
        (edit(tensors, name, shape=(1, *tensors[name].shape)), "expected shape"),
        (edit(tensors, name, dtype="I16"), "expected dtype"),
        (tensors | {f"{name}_scale_inv": tensors[name]}, "unexpected"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_drafter(rewrite(drafter, changed))


@pytest.mark.slow
def test_the_release_is_proven_without_reading_it(tmp_path):
    """All 160,000 tensors of the release in sparse files: 564 GB that take no room."""
    preset = PRESETS["mimo-v2.5-pro"]
    config = BackboneConfig.from_hf(preset.backbone)
    weight_map, header, number, end = {}, {}, 0, 0

    def finish():
        encoded = json.dumps(header).encode()
        with (tmp_path / f"part-{number}.safetensors").open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + end)

    for tensor in backbone_outputs(config, preset, 0):
        if end + tensor.nbytes > 17 * 10**9:
            finish()
            number, header, end = number + 1, {}, 0
        offsets = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        weight_map[tensor.name] = f"part-{number}.safetensors"
        end += tensor.nbytes
    finish()
    index = {"metadata": {"tp_size": 8}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    summary = BackboneCheckpoint(tmp_path, config).summary
    assert summary.parameters == 1_021_248_126_336
    assert [(p.name, p.nbytes) for p in summary.skipped] == [("mtp", 2_463_635_712)]
    assert summary.nbytes + 2_463_635_712 == 564_286_050_048
