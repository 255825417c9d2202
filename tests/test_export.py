"""Writing checkpoints: layout, order, atomic replacement."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors

from mimo_jax.export import OutputTensor, new_folder, write_tensors
from mimo_jax.safetensors_reader import CheckpointError, CheckpointFolder


def output(name, dtype, array, pieces=1):
    return OutputTensor(name, dtype, array.shape, lambda: iter(np.array_split(array, pieces)))


@pytest.fixture
def arrays(rng):
    return {
        "z.codes": ("U8", rng.integers(0, 256, (5, 3), np.uint8)),
        "a.scale": ("F32", rng.standard_normal((7,)).astype(np.float32)),
        "b.fp8": ("F8_E4M3", rng.standard_normal((3, 5)).astype(ml_dtypes.float8_e4m3fn)),
        "c.weight": ("BF16", rng.standard_normal((9, 4)).astype(ml_dtypes.bfloat16)),
        "d.empty": ("F32", np.zeros((0, 4), np.float32)),
    }


@pytest.mark.parametrize("shard_bytes", [1, 50, 100, 10**9])
@pytest.mark.parametrize("pieces", [1, 3])
def test_round_trip(tmp_path, arrays, shard_bytes, pieces):
    told: list[int] = []
    outputs = [output(n, d, a, pieces) for n, (d, a) in arrays.items()]
    write_tensors(tmp_path, outputs, metadata={"tp_size": 8}, shard_bytes=shard_bytes, progress=told.append)
    folder = CheckpointFolder(tmp_path)
    assert list(folder.tensors) == list(arrays)
    for name, (dtype, array) in arrays.items():
        assert folder.tensors[name].dtype == dtype
        assert folder.tensors[name].read().tobytes() == array.tobytes()
        assert folder.tensors[name].start % (array.dtype.itemsize) == 0
    total = sum(a.nbytes for _, a in arrays.values())
    assert folder.metadata == {"total_size": total, "tp_size": 8}
    assert sum(told) == total
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) == {1: 4, 50: 3, 100: 2, 10**9: 1}[shard_bytes]
    for file in files:  # the library agrees
        with safetensors.safe_open(tmp_path / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_the_library_reads_values(tmp_path, rng):
    array = rng.standard_normal((5, 6)).astype(np.float32)
    write_tensors(tmp_path, [output("x", "F32", array)], prefix="part")
    with safetensors.safe_open(tmp_path / "part-00001-of-00001.safetensors", "numpy") as opened:
        np.testing.assert_array_equal(opened.get_tensor("x"), array)


def test_refuses_wrong_values(tmp_path):
    array = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="x: 16 bytes were made, 20 are needed"):
        write_tensors(tmp_path, [OutputTensor("x", "F32", (5,), lambda: [array])])
    with pytest.raises(ValueError, match="same name"):
        write_tensors(tmp_path, [output("x", "F32", array), output("x", "F32", array)])
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path, [output("x", "F32", array)])


def test_new_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "model"
    with new_folder(out) as folder:
        (folder / "config.json").write_text("{}")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["config.json"]
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_new_folder_vanishes_after_a_failure(tmp_path):
    def fail():
        with new_folder(tmp_path / "model") as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def make(out, content, **settings):
    with new_folder(out, **settings) as folder:
        (folder / "config.json").write_text(json.dumps(content))


def test_new_folder_replaces_only_checkpoints_and_only_when_told(tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    make(out, 1)  # an empty folder is not in the way
    with pytest.raises(CheckpointError, match="already exists"):
        make(out, 2)
    make(out, 3, overwrite=True)
    assert (out / "config.json").read_text() == "3"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "diary.txt").write_text("x")
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        make(precious, 4, overwrite=True)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        make(precious / "diary.txt", 4, overwrite=True)
    assert (precious / "diary.txt").read_text() == "x"
