"""`mask_embedding.pt` without torch: a drafter's mask token and its vector, saved by `torch.save`.

The file is a zip of stored members with a pickle inside. The pickle is not given to Python's `pickle`: a small
interpreter here knows numbers, strings, lists, tuples, dictionaries and the rebuilding of a float tensor, and refuses
every other opcode and every other global. Nothing in the file can name code to run.
"""

import hashlib
import math
import os
import pickletools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.safetensors_reader import CheckpointError, shorten

_MAX_FILE = 1 << 26
_MAX_PICKLE = 1 << 16
_MAX_MEMBERS = 64
_STORAGES = {
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch HalfStorage": np.dtype(np.float16),
    "torch FloatStorage": np.dtype(np.float32),
    "torch DoubleStorage": np.dtype(np.float64),
}
_REBUILD = "torch._utils _rebuild_tensor_v2"
_ORDERED_DICT = "collections OrderedDict"
_GLOBALS = {*_STORAGES, _REBUILD, _ORDERED_DICT}
_ID_KEYS = ("mask_token_id", "token_id", "mask_id")


@dataclass(frozen=True)
class _Global:
    name: str


class _Mark:
    pass


_MARK = _Mark()


def read_mask_embedding(path: Path, hidden: int) -> tuple[int, np.ndarray]:
    """Read a sidecar.

    Args:
        path: A file `{"mask_token_id": int, "embedding": bfloat16 [hidden]}` from `torch.save`. The tensor may have
            another name if it is the only one of that length.
        hidden: Length of the vector.

    Returns:
        The mask token's id and the vector [hidden] in its stored dtype.

    Raises:
        CheckpointError: The file is anything else; the message names it.
    """
    try:
        value = _read(path)
    except _Refused as refused:
        raise CheckpointError(f"{path}: {refused}") from None
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError) as error:
        raise CheckpointError(f"{path}: not a file that torch.save wrote ({shorten(error)})") from None
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: a broken file ({type(error).__name__}: {shorten(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a dictionary, found {type(value).__name__}")
    if value.get("per_position") not in (None, False):
        raise CheckpointError(f"{path}: per_position vectors are not supported: a block has one mask vector")
    tensors = {key: v for key, v in value.items() if isinstance(v, np.ndarray)}
    fitting = [v for v in tensors.values() if v.shape in ((hidden,), (1, hidden))]
    if "embedding" in tensors:
        fitting = [v for v in fitting if v is tensors["embedding"]]
    if len(fitting) != 1:
        shapes = ", ".join(f"{shorten(k)} {list(v.shape)}" for k, v in tensors.items()) or "no tensor"
        raise CheckpointError(f"{path}: expected one vector [{hidden}], the hidden size; found {shapes}")
    vector = fitting[0].reshape(-1)
    if not np.isfinite(vector.astype(np.float32)).all():
        raise CheckpointError(f"{path}: the vector holds values that are not finite")
    keys = [k for k in _ID_KEYS if k in value]
    token = value[keys[0]] if len(keys) == 1 else None
    if type(token) is not int or token < 0:
        raise CheckpointError(f"{path}: expected mask_token_id, a token id")
    return token, vector


def write_mask_embedding(path: Path, token: int, vector: np.ndarray) -> None:
    """Write a sidecar as `torch.save` does: the members, the pickle and the alignment of the data.

    Args:
        path: Replaced if it exists.
        token: The mask token's id.
        vector: [hidden] bfloat16.
    """
    if vector.dtype != ml_dtypes.bfloat16 or vector.ndim != 1 or not 0 <= token < 2**31:
        raise ValueError(f"expected a token id and a bfloat16 vector, not {token} and {vector.dtype} {vector.shape}")
    data = vector.tobytes()
    serialization_id = str(int.from_bytes(hashlib.sha256(data).digest()) % 10**40).zfill(40)
    members = (
        ("data.pkl", _pickle(token, len(vector))),
        (".format_version", b"1"),
        (".storage_alignment", b"64"),
        ("byteorder", b"little"),
        ("data/0", data),
        ("version", b"3\n"),
        (".data/serialization_id", serialization_id.encode()),
    )
    partial = path.with_name(f".{path.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(f"{path.stem}/{name}")
            if name == "data/0":  # torch maps storages into memory: they start at multiples of 64
                assert archive.fp is not None
                start = archive.fp.tell() + 30 + len(info.filename) + 4
                padding = -start % 64
                info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(info, content)
    os.replace(partial, path)


class _Refused(Exception):
    """A file that this reader does not accept, with the reason."""


def _read(path: Path) -> Any:
    if not path.is_file() or path.stat().st_size > _MAX_FILE:
        raise _Refused(f"not a regular file of at most {_MAX_FILE} bytes")
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if len(infos) > _MAX_MEMBERS or len({i.filename for i in infos}) != len(infos):
            raise _Refused("too many members, or two of one name")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1 or info.file_size != info.compress_size:
                raise _Refused(f"{shorten(info.filename)} is compressed or encrypted; torch.save only stores")
            parts = info.filename.split("/")
            if info.file_size > _MAX_FILE or ".." in parts or "" in parts or "\\" in info.filename:
                raise _Refused(f"{shorten(info.filename)} is no member of such a file")
        pickles = [i for i in infos if i.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
            raise _Refused(f"expected one data.pkl of at most {_MAX_PICKLE} bytes")
        members = {i.filename: i for i in infos}
        prefix = pickles[0].filename.removesuffix("data.pkl")
        order = members.get(prefix + "byteorder")
        if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
            raise _Refused("byteorder is not little")

        def storage(key: str) -> bytes:
            if (member := members.get(f"{prefix}data/{key}")) is None:
                raise _Refused(f"the data of storage {shorten(key)} is missing")
            return archive.read(member)

        return _Interpreter(storage).run(archive.read(pickles[0]))


class _Interpreter:
    """Runs the few opcodes of pickle protocol 2 that such a file needs."""

    def __init__(self, storage: Any):
        self._storage = storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        """The value that a pickle stands for."""
        for position, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            name = opcode.name
            if (name == "PROTO") != (position == 0) or (name == "PROTO" and argument != 2):
                raise _Refused("the pickle is not of protocol 2")
            if name == "STOP":
                if len(self._stack) != 1:
                    raise _Refused("the pickle leaves more than one value")
                return self._stack[0]
            self._step(name, argument)
        raise _Refused("the pickle does not end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(self._above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop() for _ in range(int(name[-1])))[::-1])
            case "APPEND":
                self._extend([self._pop()])
            case "APPENDS":
                self._extend(self._above_mark())
            case "SETITEM":
                item = self._pop()
                self._update([self._pop(), item])
            case "SETITEMS":
                self._update(self._above_mark())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                if argument not in _GLOBALS:
                    raise _Refused(f"the pickle names {shorten(argument)}, which no mask embedding needs")
                stack.append(_Global(argument))
            case "BINPERSID":
                stack.append(self._load_storage(self._pop()))
            case "REDUCE":
                arguments = self._pop()
                stack.append(self._reduce(self._pop(), arguments))
            case _:
                raise _Refused(f"the pickle has the opcode {name}, which no mask embedding needs")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise _Refused("the pickle is out of order")
        return value

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise _Refused("the pickle is out of order")
        return self._stack[-1]

    def _above_mark(self) -> list[Any]:
        at = max((i for i, value in enumerate(self._stack) if value is _MARK), default=-1)
        if at < 0:
            raise _Refused("the pickle is out of order")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise _Refused("the pickle appends to something that is no list")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2 or any(type(key) not in (str, int) for key in items[::2]):
            raise _Refused("the pickle sets items of something that is no dictionary, or by odd keys")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _load_storage(self, identity: Any) -> np.ndarray:
        match identity:
            case ("storage", _Global(name), str(key), str(), int(count)) if name in _STORAGES and count >= 0:
                data, dtype = self._storage(key), _STORAGES[name]
            case _:
                raise _Refused("the pickle refers to a storage in an unknown way")
        if len(data) != count * dtype.itemsize:
            raise _Refused(
                f"storage {shorten(key)} has {len(data)} bytes, {count} {dtype} take {count * dtype.itemsize}"
            )
        return np.frombuffer(data, dtype)

    def _reduce(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Global("collections OrderedDict"), ():
                return {}
            case _Global("torch._utils _rebuild_tensor_v2"), (np.ndarray() as data, int(start), size, stride, _, {}):
                return _tensor(data, start, size, stride)
        raise _Refused("the pickle calls something in an unknown way")


def _tensor(data: np.ndarray, offset: int, size: Any, stride: Any) -> np.ndarray:
    """The tensor of a storage [elements], a copy; every element it names must lie inside."""
    good = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 4
    if not good or not all(type(n) is int and 0 <= n <= _MAX_FILE for n in (offset, *size, *stride)):
        raise _Refused("a tensor's size, stride or offset is no tuple of small numbers")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    elements = math.prod(size)
    if data.ndim != 1 or elements > len(data) or (elements and last >= len(data)):
        raise _Refused("a tensor reaches outside its storage")
    if not elements:
        return np.empty(size, data.dtype)
    strides = [s * data.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(data[offset:], size, strides).copy()


def _pickle(token: int, length: int) -> bytes:
    """What `pickle` protocol 2 makes of the dictionary, opcode for opcode."""
    memo = iter(range(256))

    def put() -> bytes:
        return b"q" + bytes([next(memo)])

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        for limit, opcode, layout in ((1 << 8, b"K", "<B"), (1 << 16, b"M", "<H"), (1 << 31, b"J", "<i")):
            if value < limit:
                return opcode + struct.pack(layout, value)
        raise ValueError(f"{value} is too large")

    def name(value: str) -> bytes:
        return b"c" + value.replace(" ", "\n").encode() + b"\n"

    return b"".join(
        (
            b"\x80\x02}", put(), b"(",
            text("mask_token_id"), put(), number(token),
            text("embedding"), put(), name(_REBUILD), put(), b"(",
            b"(", text("storage"), put(), name("torch BFloat16Storage"), put(), text("0"), put(), text("cpu"), put(),
            number(length), b"t", put(), b"Q",
            number(0), number(length), b"\x85", put(), number(1), b"\x85", put(), b"\x89",
            name(_ORDERED_DICT), put(), b")R", put(),
            b"t", put(), b"R", put(), b"u.",
        )
    )  # fmt: skip
