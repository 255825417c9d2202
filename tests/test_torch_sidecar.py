"""Mask vectors saved by torch: read without it, and hostile ones refused without running anything."""

import collections
import io
import os
import pickle
import pickletools
import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mimo_jax.safetensors_reader import CheckpointError, SafetensorsFile
from mimo_jax.torch_sidecar import read_mask_embedding, write_mask_embedding
from tests.conftest import golden_folders, golden_id

DRAFTERS = [f / d for f in golden_folders("dflash_tiny") for d in ("drafter_random", "drafter_mimo", "drafter_plain")]
HIDDEN = 8
VECTOR = np.arange(HIDDEN).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("folder", DRAFTERS, ids=lambda f: f"{golden_id(f.parent)}-{f.name}")
def test_reads_and_writes_what_torch_does(folder, tmp_path):
    original = folder / "mask_embedding.pt"
    copy = SafetensorsFile(folder / "mask_embedding_copy.safetensors").tensors["embedding"].read()
    token, vector = read_mask_embedding(original, len(copy))
    assert token == 103
    assert vector.dtype == ml_dtypes.bfloat16
    assert vector.tobytes() == copy.tobytes()

    ours = tmp_path / "mask_embedding.pt"
    write_mask_embedding(ours, token, vector)
    assert os.listdir(tmp_path) == ["mask_embedding.pt"]
    with zipfile.ZipFile(original) as theirs, zipfile.ZipFile(ours) as mine:
        assert mine.namelist() == theirs.namelist()
        for name in mine.namelist():
            if not name.endswith("serialization_id"):
                assert mine.read(name) == theirs.read(name), name
        info = mine.getinfo("mask_embedding/data/0")
        assert (info.header_offset + len(info.FileHeader())) % 64 == 0
    back = read_mask_embedding(ours, len(copy))
    assert (back[0], back[1].tobytes()) == (token, vector.tobytes())


@pytest.mark.parametrize("token", [0, 255, 256, 65535, 65536, 151669, 2**31 - 1])
@pytest.mark.parametrize("hidden", [1, 255, 256, 6144, 70000])
def test_any_size_comes_back(tmp_path, token, hidden, rng):
    vector = rng.standard_normal(hidden).astype(ml_dtypes.bfloat16)
    write_mask_embedding(tmp_path / "m.pt", token, vector)
    back = read_mask_embedding(tmp_path / "m.pt", hidden)
    assert (back[0], back[1].tobytes()) == (token, vector.tobytes())


# Protocol 2 opcodes, written by hand so that any file can be made.
def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value):
    return b"J" + struct.pack("<i", value)


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def numbers(*values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage(kind="BFloat16Storage", key="0", count=HIDDEN):
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + integer(count) + b"tQ"


def tensor(size=(HIDDEN,), stride=(1,), offset=0, source=None):
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    source = storage() if source is None else source
    tail = b"\x89" + name("collections", "OrderedDict") + b")R"
    return rebuild + b"(" + source + integer(offset) + numbers(*size) + numbers(*stride) + tail + b"tR"


def dictionary(**items):
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items.items()) + b"u."


def archive(path, pickled, data=None, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("m/data.pkl", pickled)
        file.writestr("m/data/0", VECTOR.tobytes() if data is None else data)
        for key, value in members.items():
            file.writestr(key.replace("__", "/"), value)
    return path


def test_hand_made_file_is_read(tmp_path):
    path = archive(tmp_path / "m.pt", dictionary(mask_token_id=integer(5), embedding=tensor()))
    assert read_mask_embedding(path, HIDDEN)[0] == 5


@pytest.mark.parametrize(
    "pickled",
    [
        dictionary(token_id=integer(5), vector=tensor()),
        dictionary(mask_token_id=integer(5), per_position=b"\x89", embedding=tensor(), other=tensor((2, 4), (4, 1))),
        dictionary(mask_token_id=integer(5), embedding=tensor((1, HIDDEN), (HIDDEN, 1)), note=text("x"), no=b"N"),
        dictionary(mask_token_id=integer(5), embedding=tensor(), list=b"](K\x01K\x02e", tuple=b"K\x01K\x02\x86"),
    ],
)
def test_other_layouts_of_the_same(tmp_path, pickled):
    token, vector = read_mask_embedding(archive(tmp_path / "m.pt", pickled), HIDDEN)
    assert token == 5
    assert vector.tobytes() == VECTOR.tobytes()


def test_other_floats_and_strides(tmp_path):
    wide = np.arange(3 * HIDDEN, dtype=np.float32)
    every_third = tensor(stride=(3,), offset=2, source=storage("FloatStorage", count=len(wide)))
    path = archive(tmp_path / "m.pt", dictionary(mask_token_id=integer(5), embedding=every_third), wide.tobytes())
    np.testing.assert_array_equal(read_mask_embedding(path, HIDDEN)[1], wide[2::3])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"embedding": tensor()}, "mask_token_id"),
        ({"mask_token_id": b"\x88", "embedding": tensor()}, "mask_token_id"),
        ({"mask_token_id": integer(-1), "embedding": tensor()}, "mask_token_id"),
        ({"mask_token_id": text("5"), "embedding": tensor()}, "mask_token_id"),
        ({"mask_token_id": integer(5), "embedding": integer(5)}, "no tensor"),
        ({"mask_token_id": integer(5), "embedding": tensor((4,))}, "hidden size; found embedding"),
        ({"mask_token_id": integer(5), "a": tensor(), "b": tensor()}, "expected one vector"),
        ({"mask_token_id": integer(5), "embedding": tensor(), "per_position": b"\x88"}, "per_position"),
        ({"mask_token_id": integer(5), "embedding": tensor((9,))}, "outside its storage"),
        ({"mask_token_id": integer(5), "embedding": tensor(offset=1)}, "outside its storage"),
        ({"mask_token_id": integer(5), "embedding": tensor(stride=(2,))}, "outside its storage"),
        ({"mask_token_id": integer(5), "embedding": tensor(stride=(-1,), offset=7)}, "small numbers"),
        ({"mask_token_id": integer(5), "embedding": tensor(offset=-1)}, "small numbers"),
        ({"mask_token_id": integer(5), "embedding": tensor((2**26,), (0,))}, "outside its storage"),
        ({"mask_token_id": integer(5), "embedding": tensor((HIDDEN,), (1, 1))}, "small numbers"),
        ({"mask_token_id": integer(5), "embedding": tensor(source=storage("LongStorage"))}, "torch LongStorage"),
        ({"mask_token_id": integer(5), "embedding": tensor(source=storage(count=7))}, "storage 0 has 16 bytes"),
        ({"mask_token_id": integer(5), "embedding": tensor(source=storage(count=-1))}, "storage in an unknown way"),
        ({"mask_token_id": integer(5), "embedding": tensor(source=storage(key="../0"))}, "storage ../0 is missing"),
        ({"mask_token_id": integer(5), "embedding": tensor(source=text("0") + b"Q")}, "storage in an unknown way"),
        ({"mask_token_id": integer(5), "embedding": tensor(source=text("0"))}, "calls something"),
        ({"mask_token_id": name("collections", "OrderedDict") + numbers(1) + b"R"}, "calls something"),
        ({"mask_token_id": text("x") + b")R"}, "calls something"),
    ],
)
def test_refuses_dictionaries(tmp_path, items, message):
    path = archive(tmp_path / "m.pt", dictionary(**items))
    with pytest.raises(CheckpointError, match=message) as raised:
        read_mask_embedding(path, HIDDEN)
    assert "m.pt" in str(raised.value)


def test_refuses_vectors_that_are_not_finite(tmp_path):
    bad = VECTOR.copy()
    bad[3] = np.nan
    write_mask_embedding(tmp_path / "m.pt", 5, bad)
    with pytest.raises(CheckpointError, match="not finite"):
        read_mask_embedding(tmp_path / "m.pt", HIDDEN)


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def touch(path):
    raise AssertionError("the file ran code")


def hostile(marker):
    command = f"touch {marker}"
    plain = {
        "os.system": Call(os.system, command),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "open": Call(open, str(marker), "w"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "nested": {"mask_token_id": 5, "embedding": [Call(os.system, command)]},
        "own function": Call(touch, str(marker)),
        "counter": collections.Counter("abc"),
        "set": {1, 2},
        "bytes": b"123",
        "complex": 1 + 2j,
    }
    for key, value in plain.items():
        for protocol in range(6):
            yield f"{key} at protocol {protocol}", pickle.dumps(value, protocol)
    by_hand = {
        "posix system": name("posix", "system") + text(command) + b"\x85R.",
        "builtins eval": name("builtins", "eval") + text("1") + b"\x85R.",
        "dotted name": name("collections", "OrderedDict.fromkeys") + b")R.",
        "dotted module": name("torch._utils", "_rebuild_tensor_v2.__globals__") + b".",
        "getattr chain": name("builtins", "getattr") + name("os", "path") + text("os") + b"\x86R.",
        "instance": b"(" + text(command) + b"ios\nsystem\n.",
        "object": b"(" + name("os", "system") + text(command) + b"o.",
        "new object": name("collections", "OrderedDict") + b")\x81.",
        "build": name("collections", "OrderedDict") + b")R}(" + text("x") + b"K\x01ub.",
        "extension": b"\x82\x01.",
        "stack global": text("os") + text("system") + b"\x93.",
        "text persistent id": b"P0\n.",
        "reduce of a dictionary": b"}" + b")R.",
        "huge memo index": b"}r\xff\xff\xff\x7f.",
        "memo that is not there": b"h\x05.",
        "huge string": b"X\xff\xff\xff\xff",
        "huge number": b"\x8b\xff\xff\xff\x7f",
        "long text number": b"I" + b"9" * 50_000 + b"\n.",
        "no stop": b"}",
        "nothing": b"",
        "empty stack": b".",
        "two values": b"}}.",
        "pop of nothing": b"a.",
        "mark on top": b"(.",
        "mark as a value": b"}(" + text("a") + b"(u.",
        "mark in the memo": b"(q\x00.",
        "no mark": b"}u.",
        "tuple of nothing": b"\x87.",
        "odd items": b"}(" + text("a") + b"u.",
        "dictionary as a key": b"}}}s.",
        "exponential tuples": b"}" + b"K\x01" + b"q\x00h\x00\x86" * 200 + b"K\x01s.",
        "exponential list": b"]" + b"q\x00h\x00\x86" * 5000 + b".",
        "deep lists": b"]" * 30_000 + b"a" * 29_999 + b".",
        "list in itself": b"]q\x00h\x00a.",
        "dup": b"}2.",
        "second protocol": b"\x80\x02}.",
    }
    for key, value in by_hand.items():
        yield key, b"\x80\x02" + value
    yield "no protocol", b"}."
    yield "garbage", bytes(range(256)) * 16


def test_hostile_pickles_run_nothing(tmp_path):
    marker, count = tmp_path / "ran", 0
    for key, pickled in hostile(marker):
        path = archive(tmp_path / "m.pt", pickled)
        start = time.perf_counter()
        with pytest.raises(CheckpointError) as raised:
            read_mask_embedding(path, HIDDEN)
        assert time.perf_counter() - start < 2, key
        assert len(str(raised.value)) < 600, key
        assert not marker.exists(), key
        count += 1
    assert count > 90


def test_hostile_pickles_are_hostile(tmp_path):
    """The first ones would run code in Python's own unpickler: the test is not of straw men."""
    marker = tmp_path / "ran"
    pickle.loads(dict(hostile(marker))["os.system at protocol 2"])
    assert marker.exists()


GOOD = dictionary(mask_token_id=integer(5), embedding=tensor())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"m__byteorder": b"big"}, "byteorder"),
        ({"m__byteorder": b"little" + bytes(1000)}, "byteorder"),
        ({"x__data.pkl": GOOD}, "one data.pkl"),
        ({"..__evil": b""}, "no member"),
        ({"__etc__passwd": b""}, "no member"),
        ({f"m__{i}": b"" for i in range(100)}, "too many members"),
    ],
)
def test_refuses_members(tmp_path, members, message):
    with pytest.raises(CheckpointError, match=message):
        read_mask_embedding(archive(tmp_path / "m.pt", GOOD, **members), HIDDEN)


def test_refuses_archives(tmp_path):
    path = tmp_path / "m.pt"

    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            read_mask_embedding(path, HIDDEN)

    archive(path, GOOD, compression=zipfile.ZIP_DEFLATED)
    refused("compressed")
    archive(path, GOOD + bytes(1 << 16))
    refused("data.pkl of at most")
    path.write_bytes(pickle.dumps({"mask_token_id": 5}))
    refused("not a file that torch.save wrote")
    path.write_bytes(b"")
    refused("not a file that torch.save wrote")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("m/nothing", b"")
    path.write_bytes(buffer.getvalue())
    refused("one data.pkl")
    path.unlink()
    path.mkdir()
    refused("regular file")
    path.rmdir()
    path.symlink_to("/dev/zero")
    refused("regular file")


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path, rng):
    path = tmp_path / "m.pt"
    write_mask_embedding(path, 5, VECTOR)
    raw = path.read_bytes()
    refused = 0
    for position in rng.permutation(len(raw) * 8)[:1500]:
        broken = bytearray(raw)
        broken[position // 8] ^= 1 << (position % 8)
        path.write_bytes(broken)
        try:
            token, vector = read_mask_embedding(path, HIDDEN)
        except CheckpointError:
            refused += 1
        else:  # dates, padding, attributes and other things that mean nothing here
            assert (token, vector.tobytes()) == (5, VECTOR.tobytes())
    assert refused > 500


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    write_mask_embedding(path, 5, VECTOR)
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            read_mask_embedding(path, HIDDEN)


def test_written_pickle_is_what_python_reads(tmp_path):
    write_mask_embedding(tmp_path / "m.pt", 151669, VECTOR)
    with zipfile.ZipFile(tmp_path / "m.pt") as file:
        pickletools.dis(file.read("m/data.pkl"), io.StringIO())


def test_writer_refuses_other_vectors(tmp_path):
    with pytest.raises(ValueError, match="bfloat16"):
        write_mask_embedding(tmp_path / "m.pt", 5, np.zeros(4, np.float32))
