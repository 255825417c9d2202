"""Headers that lie, and folders whose index does."""

import json
import os
import re
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mimo_jax.safetensors_reader import CheckpointError, CheckpointFolder, SafetensorsFile

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def file(path, header, data=bytes(24), length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def entry(**changes):
    return {"a": GOOD["a"] | changes}


def test_reads_what_the_library_writes(tmp_path, rng):
    arrays = {
        "f32": rng.standard_normal((5, 7)).astype(np.float32),
        "f16": rng.standard_normal((3,)).astype(np.float16),
        "bf16": rng.standard_normal((4, 6)).astype(ml_dtypes.bfloat16),
        "u8": rng.integers(0, 256, (9, 2, 5), np.uint8),
        "i64": rng.integers(0, 256, (2, 2)),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 4), np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"who": "me"})
    opened = SafetensorsFile(tmp_path / "x.safetensors")
    assert opened.metadata == {"who": "me"}
    assert set(opened.tensors) == set(arrays)
    for name, array in arrays.items():
        got = opened.tensors[name].read()
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes()


def test_reads_ranges_of_rows(tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
    safetensors.numpy.save_file({"x": array}, tmp_path / "x.safetensors")
    tensor = SafetensorsFile(tmp_path / "x.safetensors").tensors["x"]
    out = np.empty((3, 2, 3), np.float32)
    tensor.read_into(out, 4)
    np.testing.assert_array_equal(out, array[4:7])
    with pytest.raises(ValueError, match="rows 8"):
        tensor.read_into(out, 8)
    with pytest.raises(ValueError, match="buffer"):
        tensor.read_into(np.empty((3, 3), np.float32), 0)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "must be a JSON object"),
        (b"{ ", "not readable JSON"),
        (b'{"a": \xff}', "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b'{"a": ' + b"9" * 6000 + b"}", "not readable JSON"),
        (b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}, "a": {}}', "a occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}', "dtype occurs twice"),
        ({"a": []}, "a: a header entry"),
        ({"a": {"dtype": "F32", "shape": [6]}}, "a: a header entry"),
        (entry(extra=1), "a: a header entry"),
        (entry(dtype="F33"), "a: unknown dtype F33"),
        (entry(dtype=["F32"]), "a: unknown dtype"),
        (entry(shape="6"), "a: not a shape"),
        (entry(shape=[2, -3]), "a: not a shape"),
        (entry(shape=[2, 3.0]), "a: not a shape"),
        (entry(shape=[True, 6]), "a: not a shape"),
        (entry(shape=[10**30]), "a: not a shape"),
        (entry(shape=[1] * 40 + [6]), "a: not a shape"),
        (entry(shape=[2, 4]), "takes 32 bytes"),
        (entry(shape=[2**40, 2**40]), "takes"),
        (entry(shape=[0, 2**61]), "takes 0 bytes"),
        (entry(dtype="BF16"), "takes 12 bytes"),
        (entry(dtype="F4", shape=[49]), "takes 24.5 bytes"),
        (entry(data_offsets=[0, 28]), "not inside"),
        (entry(data_offsets=[24, 0]), "not inside"),
        (entry(data_offsets=[-4, 20]), "two byte positions"),
        (entry(data_offsets=[0, 24, 48]), "two byte positions"),
        (entry(data_offsets=[0, 2**70]), "two byte positions"),
        (entry(shape=[5], data_offsets=[4, 24]), "leaves a hole"),
        (entry(shape=[5], data_offsets=[0, 20]), "accounts for"),
        (GOOD | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}}, "b overlaps"),
        (GOOD | {"__metadata__": {"a": 1}}, "__metadata__"),
        (GOOD | {"__metadata__": "x"}, "__metadata__"),
    ],
)
def test_refuses_headers(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        SafetensorsFile(file(tmp_path / "x.safetensors", header))
    assert "x.safetensors" in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**40, 2**63, 2**64 - 1])
def test_refuses_header_lengths(tmp_path, length):
    with pytest.raises(CheckpointError, match="header would be"):
        SafetensorsFile(file(tmp_path / "x.safetensors", GOOD, length=length))


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be opened|not a regular file"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path / "pipe")
    (tmp_path / "short").write_bytes(b"1234567")
    with pytest.raises(CheckpointError, match="too few"):
        SafetensorsFile(tmp_path / "short")


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    path = file(tmp_path / "x.safetensors", GOOD)
    opened = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="4 bytes too early"):
        opened.tensors["a"].read()


def folder(path, weight_map, files=("one.safetensors",), **more):
    for i, name in enumerate(files):
        (path / name).parent.mkdir(exist_ok=True)
        file(path / name, {f"{chr(97 + i)}": GOOD["a"]})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map} | more))
    return path


def test_folder_with_an_index(tmp_path):
    path = folder(
        tmp_path,
        {"a": "one.safetensors", "b": "sub/two.safetensors"},
        ("one.safetensors", "sub/two.safetensors", "stray.safetensors"),
        metadata={"tp_size": 8},
    )
    opened = CheckpointFolder(path)
    assert set(opened.tensors) == {"a", "b"}
    assert opened.metadata == {"tp_size": 8}


def test_folder_with_a_single_file(tmp_path):
    file(tmp_path / "model.safetensors", GOOD)
    assert set(CheckpointFolder(tmp_path).tensors) == {"a"}


def test_links_of_a_download_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    file(tmp_path / "blobs" / "0123", GOOD)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to("../blobs/0123")
    assert set(CheckpointFolder(snapshot).tensors) == {"a"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../one.safetensors"}, "not a safetensors file inside"),
        ({"a": "sub/../one.safetensors"}, "not a safetensors file inside"),
        ({"a": "/etc/one.safetensors"}, "not a safetensors file inside"),
        ({"a": "C:\\one.safetensors"}, "not a safetensors file inside"),
        ({"a": "one.safetensors\x00"}, "not a safetensors file inside"),
        ({"a": "one.bin"}, "not a safetensors file inside"),
        ({"a": 3}, "not a safetensors file inside"),
        ({"a": "missing.safetensors"}, "no such file"),
        ({"b": "one.safetensors"}, "not in the file the index names: b"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "not in the file the index names: b"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "twin.safetensors"}, "in two files: a"),
        ({}, "weight_map must be"),
        ([], "weight_map must be"),
    ],
)
def test_refuses_indices(tmp_path, weight_map, message):
    folder(tmp_path, weight_map, ("one.safetensors", "two.safetensors"))
    file(
        tmp_path / "twin.safetensors",
        GOOD | {"c": {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]}},
        bytes(28),
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        CheckpointFolder(tmp_path)


def test_refuses_tensors_the_index_leaves_out(tmp_path):
    folder(tmp_path, {"b": "two.safetensors"}, ("one.safetensors", "two.safetensors"))
    both = GOOD | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]}}
    file(tmp_path / "two.safetensors", both, bytes(28))
    with pytest.raises(CheckpointError, match="not in the index: a"):
        CheckpointFolder(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": {"a": "x", "a": "x"}}', '{"weight_map": {}, "metadata": 1}']
)
def test_refuses_broken_indices(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        CheckpointFolder(tmp_path)


def test_refuses_empty_folders(tmp_path):
    with pytest.raises(CheckpointError, match="has neither"):
        CheckpointFolder(tmp_path)
