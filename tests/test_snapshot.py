"""Snapshots: what was saved comes back bit for bit on any mesh, and what does not fit is refused with the reason."""

import hashlib
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.cli import main
from mimo_jax.generate import Generator
from mimo_jax.model import LoadOptions, load_model
from mimo_jax.request import SamplingParams
from mimo_jax.snapshot import MANIFEST, SnapshotError, _checksums, _sums
from mimo_jax.synthesize import synthesize
from sharding.topology import Topology
from tests.checkpoint_files import MICRO, assert_same
from tests.conftest import golden_folders, golden_id
from tests.test_hosts_decoding import pair, start, tokens

TWO_BY_TWO = Topology(4, 2, 4, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1)


def load(folder, snapshot=None, **options):
    return load_model(folder, LoadOptions(snapshot=snapshot, **options))


def assert_restores(folder, snapshot, saved_as=(), restored_as=(), **options):
    """Save, restore, and compare with what loading gives there; the checkpoint's data is not read again."""
    load(folder, snapshot, **options | dict(saved_as))
    expected = load(folder, **options | dict(restored_as)).params
    told = []
    restored = load_model(
        folder, LoadOptions(snapshot=snapshot, **options | dict(restored_as)), lambda *a: told.append(a)
    )
    assert told == []
    assert jax.tree.structure(restored.params) == jax.tree.structure(expected)
    assert_same(vars(restored.params), vars(expected))
    assert [x.sharding for x in jax.tree.leaves(restored.params)] == [x.sharding for x in jax.tree.leaves(expected)]
    return restored


@pytest.mark.parametrize("storage", ["packed", "expanded"])
@pytest.mark.parametrize("folder", golden_folders("backbone_tiny_mxfp4"), ids=golden_id)
def test_quantised_weights_come_back(folder, storage, tmp_path):
    restored = assert_restores(folder, tmp_path / "a" / "snapshot", storage=storage, dtype="bfloat16")
    dtypes = {str(x.dtype) for x in jax.tree.leaves(restored.params)}
    assert dtypes >= ({"uint8", "float8_e4m3fn", "float32", "bfloat16"} if storage == "packed" else {"bfloat16"})


@pytest.mark.parametrize("folder", golden_folders("dflash_tiny"), ids=golden_id)
@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_a_drafter_comes_back(folder, storage, tmp_path):
    assert_restores(folder / "target", tmp_path / "snapshot", drafter=folder / "drafter_random", storage=storage)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshots") / "tiny"
    synthesize("tiny", folder, seed=11)
    return folder


def test_checksums_are_sums_of_numbers(rng):
    """Of as many bytes as a row falls into evenly, up to four, the first the least."""
    arrays, expected = {}, {}
    for dtype in ("uint8", "float8_e4m3fn", "bfloat16", "float32"):
        for columns, lead in itertools.product((1, 2, 3, 6, 8), ((), (3,), (5, 3))):
            name, row = f"{dtype} {lead} {columns}", columns * np.dtype(dtype).itemsize
            stored = rng.integers(0, 256, (*lead, row)).astype(np.uint8)
            together = next(n for n in (4, 2, 1) if row % n == 0)
            arrays[name] = jnp.asarray(stored.view(dtype))
            expected[name] = int(stored.view(f"<u{together}").astype(np.uint64).sum()) % 2**32
    assert _checksums(arrays) == expected


def test_checksums_copy_a_layer_at_a_time():
    shape = jax.ShapeDtypeStruct((32, 1 << 15, 64), "uint8")
    memory = _sums.lower({"x": shape}).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < shape.size / 8


def test_another_mesh(tiny, tmp_path):
    saved, restored = {"topology": TWO_BY_TWO}, {"topology": Topology(2)}
    assert_restores(tiny, tmp_path / "snapshot", saved, restored, storage="packed", drafter="none")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint and its snapshot."""
    folder = tmp_path_factory.mktemp("snapshots")
    synthesize(MICRO, folder / "model", seed=7)
    load(folder / "model", folder / "snapshot", storage="packed", dtype="float32")
    return folder


@pytest.mark.slow
def test_another_mesh_gives_the_same_tokens(made):
    def answers(topology):
        model = load(made / "model", made / "snapshot", topology=topology, storage="packed", dtype="float32")
        settings = [SamplingParams(max_new_tokens=12, temperature=t, seed=3) for t in (0.0, 1.0)]
        return [c.token_ids for c in Generator(model).generate_batch(([5, 6, 7, 8], [100, 17]), settings)]

    assert answers(Topology()) == answers(TWO_BY_TWO)


@pytest.mark.slow
def test_two_processes_save_and_restore(tiny, tmp_path, address):
    """Each its part; one process alone restores what both have saved."""
    asked = ("--prompt-ids", "[5, 6, 7, 8]", "--max-new-tokens", "8", "--ignore-eos")
    asked = (*asked, "--storage", "packed", "--snapshot", str(tmp_path / "snapshot"))
    found = []
    for _ in range(2):
        (first, said), _ = (one.communicate(timeout=120) for one in pair(tiny, address, *asked))
        found.append(tokens(first))
        assert found[-1], said
        assert (tmp_path / "snapshot" / MANIFEST).is_file()
    alone, said = start(tiny, 4, *asked).communicate(timeout=120)
    assert tokens(alone) == found[0] == found[1], said


@pytest.fixture
def copy(made, tmp_path):
    """The same, to be spoiled."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(folder, *said, model="model", **options):
    before = sorted(folder.rglob("*"))
    with pytest.raises(SnapshotError) as raised:
        load(folder / model, folder / "snapshot", **{"storage": "packed", "dtype": "float32"} | options)
    message = str(raised.value)
    assert message.startswith(f"{folder / 'snapshot'}: ")
    assert "another folder" in message
    for part in said:
        assert part in message
    assert sorted(folder.rglob("*")) == before
    return message


def test_a_moved_checkpoint_is_the_same(copy):
    (copy / "model").rename(copy / "elsewhere")
    load(copy / "elsewhere", copy / "snapshot", storage="packed", dtype="float32")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"storage": "expanded"}, "storage was packed and is expanded"),
        ({"dtype": "bfloat16"}, "dtype was float32 and is bfloat16"),
        ({"qkv_layout": "chunked"}, "qkv_layout was auto and is chunked"),
        ({"drafter": "none"}, " and is absent; drafter/mask_embedding.pt was "),
    ],
)
def test_other_options(made, options, said):
    refused(made, said, **options)


def test_options_that_change_no_weight(made):
    model = load(
        made / "model", made / "snapshot", storage="packed", dtype="float32", draft_rope_theta=5e6, swa_visible_keys=8
    )
    assert model.drafter_config is not None
    assert model.drafter_config.attention.rope_theta == 5e6


@pytest.mark.parametrize("whole", [0, 1 << 25])
def test_weights_that_changed(copy, monkeypatch, whole):
    """Of the same sizes and shapes, as after more training; of large files, samples are compared."""
    monkeypatch.setattr("mimo_jax.snapshot._WHOLE_BYTES", whole)
    shutil.rmtree(copy / "snapshot")
    load(copy / "model", copy / "snapshot", storage="packed", dtype="float32")
    load(copy / "model", copy / "snapshot", storage="packed", dtype="float32")
    synthesize(MICRO, copy / "model", seed=8, overwrite=True)
    said = refused(copy, "backbone/model-00001-of-00001.safetensors has other contents of the same size")
    assert "config.json" not in said


def test_a_configuration_that_changed(copy):
    config = json.loads((copy / "model" / "config.json").read_text())
    (copy / "model" / "config.json").write_text(json.dumps(config | {"rope_theta": 12345}))
    refused(copy, "made of another checkpoint, or before it changed: backbone/config.json was ", " bytes and is ")


def test_another_model(copy, tiny):
    shutil.copytree(tiny, copy / "tiny")
    refused(copy, "another checkpoint", "backbone/config.json was", model="tiny")


def edited(copy, change):
    manifest = json.loads((copy / "snapshot" / MANIFEST).read_text())
    change(manifest)
    (copy / "snapshot" / MANIFEST).write_text(json.dumps(manifest))


def test_other_shapes(copy):
    """As those of a topology that has other copies of KV heads."""
    name = "backbone.layers.full_dense.attention.k.values"
    edited(copy, lambda m: m["arrays"].update({name: "float8_e4m3fn [1, 96, 64]"}))
    refused(
        copy, f"other arrays than this topology and version use: {name} was float8_e4m3fn [1, 96, 64] and is float8"
    )


def test_another_format(copy):
    edited(copy, lambda m: m.update(format=0))
    refused(copy, "has snapshot format 0, and 1 is expected")


def test_unfinished(copy):
    (copy / "snapshot" / MANIFEST).unlink()
    refused(copy, f"unfinished snapshot, without {MANIFEST}")
    (copy / "snapshot" / f"{MANIFEST}.partial").write_text("{")
    refused(copy, "unfinished")


def test_stopped_while_it_is_written(copy, monkeypatch, caplog):
    """What was loaded is not lost for it, and what was written is no snapshot."""
    shutil.rmtree(copy / "snapshot")
    monkeypatch.setattr("mimo_jax.snapshot._checksums", lambda arrays: 1 / 0)
    one, other = (load(copy / "model", where).params for where in (copy / "snapshot", None))
    assert_same(vars(one), vars(other))
    assert "snapshot could not be written (ZeroDivisionError" in caplog.text
    refused(copy, "unfinished")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "options": []}', "\xff"])
def test_a_damaged_manifest(copy, text):
    (copy / "snapshot" / MANIFEST).write_text(text, encoding="latin-1")
    refused(copy, f"is damaged: {MANIFEST}")


def largest(copy):
    """The file that holds most of the weights, and its size."""
    return max(((p, p.stat().st_size) for p in (copy / "snapshot").rglob("*") if p.is_file()), key=lambda f: f[1])


def test_data_that_is_gone_or_short(copy):
    path, size = largest(copy)
    name = path.relative_to(copy / "snapshot")
    path.write_bytes(path.read_bytes()[:-10])
    refused(copy, f"is damaged: {name} was {size:,} bytes and is {size - 10:,}")
    path.unlink()
    refused(copy, f"is damaged: {name} was {size:,} bytes and is absent")


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_data_that_differs(copy, where):
    """Checksums of the arrays find what samples of a large file do not show."""
    path, size = largest(copy)
    name = path.relative_to(copy / "snapshot").as_posix()
    data = bytearray(path.read_bytes())
    data[int(where * size)] ^= 0x10
    path.write_bytes(data)
    refused(copy, f"is damaged: {name} has other contents of the same size")
    edited(copy, lambda m: m["data"][name].update(digest=hashlib.sha256(data).hexdigest()))
    refused(copy, "is damaged: the checksums of these arrays differ: ")


def test_data_that_orbax_cannot_read(copy):
    path = copy / "snapshot" / "weights" / "_METADATA"
    path.write_text("{")
    edited(copy, lambda m: m["data"].pop("weights/_METADATA"))
    refused(copy, "is probably damaged: ValueError: Orbax finds no arrays in weights")


def test_a_folder_of_something_else(copy):
    shutil.rmtree(copy / "snapshot")
    shutil.copytree(copy / "model" / "dflash", copy / "snapshot")
    refused(copy, "is not empty and no snapshot (it holds config.json")
    shutil.rmtree(copy / "snapshot")
    (copy / "snapshot").write_text("x")
    refused(copy, "is a file")


def test_the_command(made, tmp_path, capsys):
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    command = ["score", "--model", made / "model", "--ids", tmp_path / "ids.json", "--snapshot", tmp_path / "snapshot"]
    for name in ("one", "two"):
        assert main([str(c) for c in (*command, "--out", tmp_path / name)]) == 0
    assert (tmp_path / "snapshot" / MANIFEST).is_file()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert main([str(c) for c in (*command, "--out", tmp_path / "three", "--dtype", "bfloat16")]) == 2
    assert "dtype was float32 and is bfloat16" in capsys.readouterr().err
