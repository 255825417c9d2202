"""Quantising a checkpoint folder: every tensor against its own few lines of arithmetic, and what is refused."""

import json
import shutil
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mimo_jax import quantize
from mimo_jax.checkpoint import BackboneCheckpoint
from mimo_jax.cli import main
from mimo_jax.config import BackboneConfig, ConfigError
from mimo_jax.model import LoadOptions, load_model
from mimo_jax.presets import Preset, quantization_config
from mimo_jax.qkv_layout import QkvLayout
from mimo_jax.quantization import FP8BlockWeight, MXFP4Weight, dequantize, encode_fp8
from mimo_jax.quantize import quantize_checkpoint
from mimo_jax.safetensors_reader import NUMPY_DTYPES, CheckpointError, CheckpointFolder, OpenFile
from mimo_jax.stored_weights import StoredWeight
from mimo_jax.synthesize import synthesize
from pallas_kernels import mxfp4
from tests.checkpoint_files import MICRO, Tensor, assert_same, declared_backbone, edit, read_tensors, write_folder

PLAIN = {k: v for k, v in MICRO.backbone.items() if k != "quantization_config"}
RELEASE = PLAIN | {"quantization_config": quantization_config(3, "mxfp4")}
FP8 = PLAIN | {"quantization_config": quantization_config(3, "fp8")}
WIDE = {"hidden_size": 160, "moe_intermediate_size": 192}  # two FP8 tiles each way, the second cut short
GATE, DOWN = (f"model.layers.1.mlp.experts.2.{name}_proj.weight" for name in ("gate", "down"))
QKV, DENSE = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of one kind each."""
    root = tmp_path_factory.mktemp("sources")
    for name, backbone in (
        ("bf16", PLAIN),
        ("bf16 split", PLAIN | {"attention_projection_layout": "split"}),
        ("fp8", FP8 | WIDE),
        ("fp8 flash", FP8 | WIDE | {"attention_projection_layout": "split", "model_type": "mimo_v2_flash"}),
        ("mxfp4", RELEASE),
    ):
        synthesize(Preset(backbone, None if "fp8" in name else MICRO.drafter, 1), root / name, seed=3)
    return root


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def metadata_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]


def is_expert(name):
    return ".mlp.experts." in name


def plain_values(tensors, name):
    """A stored weight in float32, by other lines than the reader's."""
    tensor = tensors[name]
    values = tensor.array(NUMPY_DTYPES[tensor.dtype]).astype(np.float32)
    if tensor.dtype != "F8_E4M3":
        return values
    scales = tensors[f"{name}_scale_inv"].array(np.float32)
    return values * np.kron(scales, np.ones((128, 128), np.float32))[: values.shape[0], : values.shape[1]]


def expanded(folder, **changes):
    """The parameters of a folder in float32."""
    config = BackboneConfig.from_hf(config_of(folder))
    return BackboneCheckpoint(folder, config, **changes).load(declared_backbone(config), storage="expanded")


@pytest.mark.parametrize("kind", ["bf16", "bf16 split", "fp8", "fp8 flash"])
@pytest.mark.parametrize("piece", [1 << 22, 200])
def test_experts_are_encoded_and_all_else_is_kept(sources, tmp_path, kind, piece, monkeypatch):
    monkeypatch.setattr(quantize, "_PIECE", piece)
    quantize_checkpoint(sources / kind, tmp_path / "out", shard_bytes=100_000)
    before, after = read_tensors(sources / kind), read_tensors(tmp_path / "out")
    experts = [name for name in before if is_expert(name) and name.endswith(".weight")]
    assert len(experts) == 2 * 4 * 3
    for name in experts:
        codes, scales = map(np.asarray, mxfp4.encode(jnp.asarray(plain_values(before, name))))
        assert after[name] == Tensor.of("U8", codes), name
        assert after[f"{name}_scale"] == Tensor.of("U8", scales), name
    kept = {name: tensor for name, tensor in before.items() if not is_expert(name)}
    assert {name: tensor for name, tensor in after.items() if not is_expert(name)} == kept
    assert len(after) == len(kept) + 2 * len(experts)


def test_the_result_loads(sources, tmp_path):
    quantize_checkpoint(sources / "bf16", tmp_path / "out")
    model = load_model(tmp_path / "out", LoadOptions(storage="packed"))
    weights = model.params.backbone["layers"]["swa_moe"]["mlp"]
    assert isinstance(weights["gate_up"], MXFP4Weight)
    assert isinstance(weights["down"], MXFP4Weight)
    assert model.params.drafter is not None
    assert model.tokenizer is not None
    before, after = expanded(sources / "bf16"), expanded(tmp_path / "out")
    for name in ("gate_up", "down"):
        one, other = (np.asarray(tree["layers"]["swa_moe"]["mlp"][name]) for tree in (before, after))
        assert 0.01 < np.linalg.norm(one - other) / np.linalg.norm(one) < 0.15


def test_files_and_words(sources, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources / "bf16", source)
    (source / "audio_tokenizer").mkdir()
    (source / "audio_tokenizer" / "model.safetensors").write_bytes(b"anything")
    (source / ".cache").mkdir()
    (source / "model.safetensors").write_bytes(b"not named by the index")
    quantize_checkpoint(source, out)
    names = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()} - {"model.safetensors"}
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == names
    for name in names - {"config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"}:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert not list(out.parent.glob(".*"))
    metadata = metadata_of(out)
    assert (metadata["save_format"], metadata["tp_size"]) == ("mxfp4", 2)
    assert metadata["total_size"] == sum(len(t.data) for t in read_tensors(out).values())
    # what a loader of FP8 linears must know: these are none
    release = quantization_config(3, "mxfp4")
    plain = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    plain += [f"model.layers.{i}.self_attn.qkv_proj" for i in range(3)]
    plain += [f"model.decoder.{n}" for n in ("self_attn.qkv_proj", *(f"mlp.{m}_proj" for m in ("gate", "up", "down")))]
    ignored = release["ignored_layers"]
    given = config_of(out)
    assert set(given["quantization_config"]["ignored_layers"]) == {*ignored, *plain}
    assert given["quantization_config"]["ignored_layers"][: len(ignored)] == ignored
    given["quantization_config"]["ignored_layers"] = ignored
    assert given == PLAIN | {"quantization_config": release}


def test_fp8_sources_become_the_release(sources, tmp_path):
    quantize_checkpoint(sources / "fp8", tmp_path / "out")
    assert config_of(tmp_path / "out") == FP8 | WIDE | {"quantization_config": quantization_config(3, "mxfp4")}
    # what it said of FP8 stays
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    other = FP8 | WIDE | {"quantization_config": stored}
    tensors = read_tensors(sources / "fp8")
    quantize_checkpoint(write_folder(tmp_path / "old", other, tensors, {"tp_size": 2}), tmp_path / "new")
    given = config_of(tmp_path / "new")["quantization_config"]
    added = {"store_dtype": "mxfp4", "mxfp4_block_size": 32, "ignored_layers": []}
    assert given == stored | added


def test_fp8_linears_are_the_release_to_the_letter(sources, tmp_path):
    quantize_checkpoint(sources / "bf16", tmp_path / "out", linears="fp8")
    before, after, release = (read_tensors(f) for f in (sources / "bf16", tmp_path / "out", sources / "mxfp4"))
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in release.items()}
    assert config_of(tmp_path / "out") == RELEASE
    assert metadata_of(tmp_path / "out") == metadata_of(sources / "mxfp4")
    assert load_model(tmp_path / "out", LoadOptions(storage="packed")).params.drafter is not None
    encoded = [name for name, tensor in after.items() if tensor.dtype == "F8_E4M3"]
    assert {QKV, DENSE, "model.mtp.layers.0.self_attn.qkv_proj.weight"} <= set(encoded)
    for name in encoded:
        chunks = np.split(plain_values(before, name), 2 if "qkv_proj" in name else 1)
        pairs = [encode_fp8(chunk, (128, 128)) for chunk in chunks]
        assert after[name] == Tensor.of("F8_E4M3", np.concatenate([values for values, _ in pairs])), name
        assert after[f"{name}_scale_inv"] == Tensor.of("F32", np.concatenate([scales for _, scales in pairs])), name
    for name in ("q", "k", "v"):
        one, other = (
            np.asarray(tree["layers"]["swa_moe"]["attention"][name])
            for tree in (expanded(sources / "bf16"), expanded(tmp_path / "out"))
        )
        assert 0.001 < np.linalg.norm(one - other) / np.linalg.norm(one) < 0.04


@pytest.mark.parametrize("piece", [1, 1 << 22])
def test_fp8_strips_change_nothing(sources, tmp_path, monkeypatch, piece):
    """One row of tiles at a time: 192 rows of K cut into tiles of 64, 128 rows of V."""
    hf = PLAIN | {"attention_projection_layout": "split", "head_dim": 48, "swa_head_dim": 48}
    synthesize(Preset(hf, None, 0), tmp_path / "source")
    monkeypatch.setattr(quantize, "_PIECE", piece)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", linears="fp8")
    before, after = read_tensors(tmp_path / "source"), read_tensors(tmp_path / "out")
    for part, rows in (("q", 192), ("k", 192), ("v", 64)):
        name = f"model.layers.1.self_attn.{part}_proj.weight"
        values, scales = encode_fp8(plain_values(before, name), (128, 128))
        assert values.shape[0] == rows
        assert after[name] == Tensor.of("F8_E4M3", values)
        assert after[f"{name}_scale_inv"] == Tensor.of("F32", scales)
    quantization = config_of(tmp_path / "out")["quantization_config"]
    assert quantization == quantization_config(3, "mxfp4")
    expanded(tmp_path / "out")


def test_row_order_that_nobody_knows_is_asked_for(sources, tmp_path):
    """Fused BF16 rows without tp_size may lie in either order."""
    source = write_folder(tmp_path / "source", PLAIN, read_tensors(sources / "bf16"))
    with pytest.raises(CheckpointError, match="--qkv-layout"):
        quantize_checkpoint(source, tmp_path / "out")
    layouts: tuple[tuple[QkvLayout, int], ...] = (("chunked", 2), ("canonical", 1))
    for layout, chunks in layouts:
        out = tmp_path / layout
        quantize_checkpoint(source, out, linears="fp8", qkv_layout=layout)
        rows = read_tensors(source)[QKV].shape[0]
        assert read_tensors(out)[f"{QKV}_scale_inv"].shape[0] == chunks * -(-rows // chunks // 128)
        assert metadata_of(out).get("tp_size") == (2 if layout == "chunked" else None)
        one = np.asarray(expanded(source, qkv_layout=layout)["layers"]["swa_moe"]["attention"]["v"])
        other = np.asarray(expanded(out, qkv_layout=layout)["layers"]["swa_moe"]["attention"]["v"])
        np.testing.assert_allclose(other, one, atol=0.07 * np.abs(one).max())


def test_what_lies_on_the_grid_comes_back(sources, tmp_path):
    """Experts that were MXFP4 once have the same values again, and after that the same bytes."""
    tensors = read_tensors(sources / "mxfp4")

    def dequantized(tensors, dtype="BF16"):
        result = {name: tensor for name, tensor in tensors.items() if not is_expert(name)}
        for name in tensors:
            if is_expert(name) and name.endswith(".weight"):
                codes, scales = (jnp.asarray(tensors[n].array(np.uint8)) for n in (name, f"{name}_scale"))
                values = np.asarray(mxfp4.decode(codes, scales)).astype(NUMPY_DTYPES[dtype])
                result[name] = Tensor.of(dtype, values)
        return result

    hf, metadata = FP8 | {"eos_token_id": 7}, {"tp_size": 2}
    source = write_folder(tmp_path / "source", hf, dequantized(tensors), metadata)
    quantize_checkpoint(source, tmp_path / "once")
    once = read_tensors(tmp_path / "once")
    assert_same(expanded(source), expanded(tmp_path / "once"))
    assert config_of(tmp_path / "once")["eos_token_id"] == 7
    source = write_folder(tmp_path / "again", hf, dequantized(once, "F32"), metadata)
    quantize_checkpoint(source, tmp_path / "twice")
    assert read_tensors(tmp_path / "twice") == once


def test_memory_does_not_grow_with_the_weights(tmp_path, monkeypatch):
    """Experts of 1.5 MB each and dense weights of 1.5 MB, in pieces of 16 Ki weights."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1536, "intermediate_size": 1536, "n_routed_experts": 2}
    synthesize(Preset(PLAIN | sizes, None, 0), tmp_path / "source")
    monkeypatch.setattr(quantize, "_PIECE", 1 << 14)
    read, largest = OpenFile.pread, 0

    def pread(self, out, offset):
        nonlocal largest
        largest = max(largest, out.nbytes)
        return read(self, out, offset)

    quantize_checkpoint(tmp_path / "source", tmp_path / "warm", linears="fp8")  # compiled now, and not counted
    monkeypatch.setattr(OpenFile, "pread", pread)
    tracemalloc.start()
    try:
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", linears="fp8")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest <= 128 * 1536 * 2  # a row of FP8 tiles, which is more than a piece
    assert peak < 4 << 20  # a row of tiles in float32 is 0.8 MB; all weights are 24 MB


def test_codes_and_scales_may_be_asked_for_in_any_order(sources, monkeypatch):
    monkeypatch.setattr(quantize, "_PIECE", 300)
    tensor = CheckpointFolder(sources / "bf16").tensors[GATE]
    codes, scales = quantize._mxfp4(StoredWeight(tensor, tensor.shape))
    expected = [np.asarray(part) for part in mxfp4.encode(jnp.asarray(tensor.read()))]
    for output, part in ((scales, 1), (codes, 0), (codes, 0), (scales, 1), (scales, 1)):
        np.testing.assert_array_equal(np.concatenate(list(output.produce())), expected[part])


def spoil(tensors, name, row, value):
    array = tensors[name].array(NUMPY_DTYPES[tensors[name].dtype]).copy()
    array[row, -1] = value
    return edit(tensors, name, data=array.tobytes())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [GATE, DOWN, QKV, DENSE])
@pytest.mark.parametrize("piece", [1 << 22, 100])
def test_numbers_that_are_not_finite_are_named(sources, tmp_path, monkeypatch, name, value, piece):
    monkeypatch.setattr(quantize, "_PIECE", piece)
    tensors = spoil(read_tensors(sources / "bf16"), name, 21, value)
    source = write_folder(tmp_path / "source", PLAIN, tensors, {"tp_size": 2})
    with pytest.raises(CheckpointError, match=rf"safetensors: {name}: row 21 holds a number that is not finite"):
        quantize_checkpoint(source, tmp_path / "out", linears="fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_largest_finite_numbers_are_not_refused(sources, tmp_path):
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    tensors = read_tensors(sources / "bf16")
    for name in (GATE, DENSE):
        tensors = spoil(tensors, name, 3, -largest)
    source = write_folder(tmp_path / "source", PLAIN, tensors, {"tp_size": 2})
    quantize_checkpoint(source, tmp_path / "out", linears="fp8")
    after = read_tensors(tmp_path / "out")
    assert after[f"{GATE}_scale"].array(np.uint8)[3, -1] == 252


def test_fp8_sources_that_are_not_finite(sources, tmp_path):
    tensors = read_tensors(sources / "fp8")
    for name, spoilt, message in (
        ("value", spoil(tensors, GATE, 150, np.nan), "row 150 holds"),
        ("scale", spoil(tensors, f"{GATE}_scale_inv", 1, np.inf), "a scale is not a finite number"),
        ("product", spoil(tensors, f"{GATE}_scale_inv", 1, 3e38), "row 128 holds"),
    ):
        source = write_folder(tmp_path / name, FP8 | WIDE, spoilt, {"tp_size": 2})
        with pytest.raises(CheckpointError, match=message):
            quantize_checkpoint(source, tmp_path / "out")


def test_refusals(sources, tmp_path, monkeypatch):
    def refused(message, source, out=tmp_path / "out", error: type[ValueError] = CheckpointError, **settings):
        with pytest.raises(error, match=message):
            quantize_checkpoint(source, out, **settings)
        assert not (tmp_path / "out").exists()

    refused("experts are MXFP4 already: model.layers.1.mlp.experts.0.down_proj.weight and 23 more", sources / "mxfp4")
    tensors = read_tensors(sources / "fp8")
    tensors.pop(f"{GATE}_scale_inv")
    refused(f"1 missing: {GATE}_scale_inv", write_folder(tmp_path / "a", FP8 | WIDE, tensors, {"tp_size": 2}))
    odd = Preset(PLAIN | {"moe_intermediate_size": 48}, None, 0)
    synthesize(odd, tmp_path / "odd")
    refused(r"down_proj.weight \(BF16 \[64, 48\] .*: MXFP4 needs a multiple of 32 columns", tmp_path / "odd")
    mtp = "model.mtp.layers.0.self_attn.qkv_proj.weight"
    tensors = edit(read_tensors(sources / "bf16"), mtp, dtype="BF16", shape=(1, 64), data=bytes(128))
    refused("2 chunks", write_folder(tmp_path / "b", PLAIN, tensors, {"tp_size": 2}), linears="fp8")
    synthesize(Preset(PLAIN | {"moe_layer_freq": [0, 0, 0]}, None, 0), tmp_path / "dense")
    refused("nothing to quantise", tmp_path / "dense")
    refused("config.json: no such file", tmp_path / "none", error=ConfigError)
    source = sources / "bf16"
    for out in (source, source / "out", sources, tmp_path / ".." / tmp_path.name / "odd" / ".."):
        refused("must be outside", source if sources in (out, *out.parents) else tmp_path / "odd", out, overwrite=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    refused("the disk has 100,000 free", source)


def test_a_folder_in_the_way(sources, tmp_path):
    shutil.copytree(sources / "mxfp4", tmp_path / "out")
    before = read_tensors(tmp_path / "out")
    with pytest.raises(CheckpointError, match="already exists"):
        quantize_checkpoint(sources / "bf16", tmp_path / "out")
    assert read_tensors(tmp_path / "out") == before
    quantize_checkpoint(sources / "bf16", tmp_path / "out", overwrite=True)
    assert read_tensors(tmp_path / "out") != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_progress(sources, tmp_path):
    told = []
    quantize_checkpoint(sources / "bf16", tmp_path / "out", progress=lambda *report: told.append(report))
    weights = sum(len(t.data) for t in read_tensors(tmp_path / "out").values())
    assert list(dict.fromkeys(report[0] for report in told)) == ["other files", "backbone"]
    assert told[-1] == ("backbone", weights, weights)
    assert [done for part, done, _ in told if part == "backbone"] == sorted(d for p, d, _ in told if p == "backbone")
    [(_, copied, total)] = [report for report in told if report[0] == "other files"][-1:]
    assert copied == total > 0


def test_command(sources, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["quantize", "--model", str(sources / "bf16"), "--out", str(out), "--linears", "fp8"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == f"wrote {out}\n"
    assert config_of(out) == RELEASE
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "already exists" in error
    assert len(error.splitlines()) == 1
    assert main([*arguments, "--overwrite"]) == 0


def test_fp8_encoding(rng):
    values = (rng.standard_normal((130, 300)) * 0.02).astype(np.float32)
    values[:128, :128] = 0
    values[128:, 256:] = 1e-40
    encoded, scales = encode_fp8(values, (128, 128))
    assert (encoded.dtype, encoded.shape) == (ml_dtypes.float8_e4m3fn, values.shape)
    assert (scales.dtype, scales.shape) == (np.float32, (2, 3))
    for i in range(2):
        for j in range(3):
            tile = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            decoded, given = encoded[tile].astype(np.float32) * scales[i, j], values[tile]
            half_step = np.maximum(np.abs(given) * 2**-4, scales[i, j] * 2**-10)
            assert (np.abs(decoded - given) <= half_step * 1.001).all()
            if (i, j) not in ((0, 0), (1, 2)):
                assert 224 <= np.abs(encoded[tile].astype(np.float32)).max() <= 448
    assert not encoded[:128, :128].astype(np.float32).any()
    assert scales.min() >= np.finfo(np.float32).tiny
    weight = FP8BlockWeight(jnp.asarray(encoded[:128]), jnp.asarray(scales[:1]))
    expected = encoded[:128].astype(np.float32) * np.repeat(scales[0], 128)[:300]
    np.testing.assert_array_equal(np.asarray(dequantize(weight, "float32")), expected)

    assert (np.frexp(scales)[0] == 0.5).all()  # powers of two


@pytest.mark.parametrize("amax", [0.875, 0.9, 1.0, 447.9, 448.0, 449.0, 480.0])
def test_fp8_keeps_what_has_four_significant_bits(rng, amax):
    values = np.clip(rng.standard_normal((128, 128)) * amax / 3, -amax, amax).astype(np.float32)
    values[0, 0] = amax
    mantissa, exponent = np.frexp(values)
    grid = np.ldexp(np.round(mantissa * 16) / 16, exponent).astype(np.float32)
    grid[np.abs(grid) < np.abs(grid).max() * 2.0**-13] = 0
    encoded, scales = encode_fp8(grid, (128, 128))
    np.testing.assert_array_equal(encoded.astype(np.float32) * scales, grid)
