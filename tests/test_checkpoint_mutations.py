"""Checkpoints broken at random: what a reader can know to be damaged is refused cleanly, and nothing else happens.

Each mutation comes with what it means, worked out from the mutated bytes by plain JSON and not by the reader. One that
leaves the meaning as it was (a date, a blank, a note) may load, and must then give the original's parameters. One that
makes another valid checkpoint (two tensors of one shape swapped) cannot be known and may load too. All others must be
refused. The counts of each are printed.
"""

import collections
import copy
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from mimo_jax.checkpoint import BackboneCheckpoint, DrafterCheckpoint
from mimo_jax.config import BackboneConfig, ConfigError, DrafterConfig
from mimo_jax.safetensors_reader import CheckpointError
from mimo_jax.synthesize import synthesize
from tests.checkpoint_files import MICRO, declared_backbone, declared_drafter

Edit = dict[str, bytes]
"""New contents of some of a checkpoint's files."""
INDEX = "model.safetensors.index.json"
DAMAGED, HARMLESS, UNKNOWABLE = "damaged", "harmless", "unknowable"


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "micro"
    synthesize(MICRO, folder, seed=7, shard_bytes=80_000)
    return folder


class Files:
    """A checkpoint's files in memory, and mutations of them."""

    def __init__(self, folder: Path, rng: np.random.Generator):
        self.folder, self.rng = folder, rng
        self.shards = sorted(p.name for p in folder.glob("*.safetensors"))
        self.raw = {name: (folder / name).read_bytes() for name in [*self.shards, INDEX]}
        self.index = json.loads(self.raw[INDEX])
        self.headers = {name: self.header(self.raw[name]) for name in self.shards}

    @staticmethod
    def header(raw: bytes) -> dict:
        return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])

    @staticmethod
    def with_header(raw: bytes, header: dict | bytes, length: int | None = None) -> bytes:
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        data = raw[8 + int.from_bytes(raw[:8], "little") :]
        return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data

    def pick(self, values):
        values = list(values)
        return values[self.rng.integers(len(values))]

    def tensor(self, shard: str) -> str:
        return self.pick(n for n in self.headers[shard] if n != "__metadata__")

    # Each gives one mutation and what it means.

    def flip_in_header(self) -> tuple[Edit, str]:
        shard = self.pick(self.shards)
        raw = bytearray(self.raw[shard])
        bit = int(self.rng.integers(8 * (8 + int.from_bytes(raw[:8], "little"))))
        raw[bit // 8] ^= 1 << (bit % 8)
        try:
            same_length = raw[:8] == self.raw[shard][:8]
            pairs = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")], object_pairs_hook=tuple)
            flipped = dict(pairs)
            known = same_length and len(flipped) == len(pairs)
            before = json.loads(self.raw[shard][8 : 8 + int.from_bytes(raw[:8], "little")], object_pairs_hook=tuple)
            notes = dict(before).pop("__metadata__", ()), flipped.pop("__metadata__", ())
            rest = {k: v for k, v in before if k != "__metadata__"}
            harmless = known and flipped == rest and [len(p) for p in notes[0]] == [len(p) for p in notes[1]]
        except (ValueError, TypeError, AttributeError):
            harmless = False
        return {shard: bytes(raw)}, HARMLESS if harmless else DAMAGED

    def truncate(self) -> tuple[Edit, str]:
        shard = self.pick(self.shards)
        return {shard: self.raw[shard][: self.rng.integers(len(self.raw[shard]))]}, DAMAGED

    def truncate_by_a_little(self) -> tuple[Edit, str]:
        shard = self.pick(self.shards)
        return {shard: self.raw[shard][: -int(self.rng.integers(1, 9))]}, DAMAGED

    def append(self) -> tuple[Edit, str]:
        shard = self.pick(self.shards)
        return {shard: self.raw[shard] + bytes(int(self.rng.integers(1, 100)))}, DAMAGED

    def oversized_length(self) -> tuple[Edit, str]:
        shard = self.pick(self.shards)
        length = int(2 ** self.rng.uniform(18, 64)) - 1
        return {shard: length.to_bytes(8, "little") + self.raw[shard][8:]}, DAMAGED

    def oversized_numbers(self) -> tuple[Edit, str]:
        shard = self.pick(self.shards)
        header = copy.deepcopy(self.headers[shard])
        entry = header[self.tensor(shard)]
        key = self.pick(["shape", "data_offsets"])
        position = int(self.rng.integers(len(entry[key])))
        entry[key][position] = int(10 ** self.rng.uniform(6, 300))
        return {shard: self.with_header(self.raw[shard], header)}, DAMAGED

    def odd_values(self) -> tuple[Edit, str]:
        shard = self.pick(self.shards)
        header = copy.deepcopy(self.headers[shard])
        entry = header[self.tensor(shard)]
        value = self.pick([None, -1, 1.5, "F32", [], {}, True, [[1]], [-1, 5], "x" * 10_000, float("nan")])
        key = self.pick(["shape", "data_offsets", "dtype"])
        damaged = value != entry[key] and not (key == "dtype" and value == "F32" and entry["dtype"] == "F32")
        entry[key] = value
        return {shard: self.with_header(self.raw[shard], header)}, DAMAGED if damaged else HARMLESS

    def other_dtype(self) -> tuple[Edit, str]:
        """A dtype of the same width: the header stays right, the tensor is not what the model needs."""
        shard = self.pick(self.shards)
        header = copy.deepcopy(self.headers[shard])
        name = self.tensor(shard)
        same = {
            "F32": ["I32", "U32"],
            "BF16": ["I16", "U16"],
            "U8": ["I8", "F8_E5M2", "BOOL"],
            "F8_E4M3": ["I8", "F8_E5M2"],
        }
        header[name]["dtype"] = self.pick(same[header[name]["dtype"]])
        return {shard: self.with_header(self.raw[shard], header)}, HARMLESS if ".mtp." in name else DAMAGED

    def reshape(self) -> tuple[Edit, str]:
        """Another shape of as many elements."""
        shard = self.pick(self.shards)
        header = copy.deepcopy(self.headers[shard])
        name = self.tensor(shard)
        shape = header[name]["shape"]
        header[name]["shape"] = self.pick([[*shape, 1], [1, *shape], [int(np.prod(shape)), 1, 1]])
        return {shard: self.with_header(self.raw[shard], header)}, HARMLESS if ".mtp." in name else DAMAGED

    def rename(self) -> tuple[Edit, str]:
        """In the header and in the index, so that both agree."""
        shard = self.pick(self.shards)
        name = self.tensor(shard)
        new = self.pick(
            [
                f"{name}x",
                f"model.{name}",
                name.replace("layers", "layer"),
                name.replace(".weight", ".bias"),
                name.upper(),
            ]
        )
        if new == name or new in self.index["weight_map"]:
            new = f"other.{name}"
        header = {new if n == name else n: e for n, e in self.headers[shard].items()}
        index = copy.deepcopy(self.index)
        index["weight_map"][new] = index["weight_map"].pop(name)
        harmless = name.startswith("model.mtp.") and new.startswith("model.mtp.")
        edit = {shard: self.with_header(self.raw[shard], header), INDEX: json.dumps(index).encode()}
        return edit, HARMLESS if harmless else DAMAGED

    def drop(self) -> tuple[Edit, str]:
        """From the index, from the header, or from both (its bytes then being a hole)."""
        shard = self.pick(self.shards)
        name = self.tensor(shard)
        header = {n: e for n, e in self.headers[shard].items() if n != name}
        index = copy.deepcopy(self.index)
        del index["weight_map"][name]
        edit = {shard: self.with_header(self.raw[shard], header), INDEX: json.dumps(index).encode()}
        for kept in self.pick([[], [shard], [INDEX]]):
            del edit[kept]
        return edit, DAMAGED

    def duplicate(self) -> tuple[Edit, str]:
        """A name twice in one header."""
        shard = self.pick(self.shards)
        text = json.dumps(self.headers[shard])
        name = self.tensor(shard)
        entry = f"{json.dumps(name)}: {json.dumps(self.headers[shard][name])}"
        return {shard: self.with_header(self.raw[shard], f"{text[:-1]}, {entry}}}".encode())}, DAMAGED

    def swap_names(self) -> tuple[Edit, str]:
        """Two tensors of a file exchange their places."""
        shard = self.pick(self.shards)
        one, other = self.tensor(shard), self.tensor(shard)
        header = copy.deepcopy(self.headers[shard])
        header[one], header[other] = header[other], header[one]
        kinds = [(header[n]["dtype"], header[n]["shape"]) for n in (one, other)]
        if one == other or (".mtp." in one and ".mtp." in other):
            meaning = HARMLESS
        else:
            meaning = UNKNOWABLE if kinds[0] == kinds[1] else DAMAGED
        return {shard: self.with_header(self.raw[shard], header)}, meaning

    def swap_files(self) -> tuple[Edit, str]:
        """Two files exchange their names."""
        one, other = self.rng.permutation(self.shards)[:2]
        return {str(one): self.raw[other], str(other): self.raw[one]}, DAMAGED

    def shift(self) -> tuple[Edit, str]:
        """A tensor's range moves, so that it overlaps its neighbour."""
        shard = self.pick(self.shards)
        header = copy.deepcopy(self.headers[shard])
        entry, by = header[self.tensor(shard)], int(self.rng.integers(1, 50))
        entry["data_offsets"] = [offset - by for offset in entry["data_offsets"]]
        return {shard: self.with_header(self.raw[shard], header)}, DAMAGED

    def point_elsewhere(self) -> tuple[Edit, str]:
        index = copy.deepcopy(self.index)
        name = self.pick(index["weight_map"])
        wrong = ["../x.safetensors", "/dev/zero", "missing.safetensors", "dflash/../x.safetensors", "", None, 3, ["x"]]
        others = [s for s in self.shards if s != index["weight_map"][name]]
        index["weight_map"][name] = self.pick([*wrong, *others])
        return {INDEX: json.dumps(index).encode()}, DAMAGED

    def edit_metadata(self) -> tuple[Edit, str]:
        index = copy.deepcopy(self.index)
        value = self.pick([None, 1, 3, 4, 16, -2, 2.5, "two", [2], {"a": 2}, 10**40, True])
        index["metadata"]["tp_size"] = value
        return {INDEX: json.dumps(index).encode()}, DAMAGED

    def flip_in_index(self) -> tuple[Edit, str]:
        raw = bytearray(self.raw[INDEX])
        bit = int(self.rng.integers(8 * len(raw)))
        raw[bit // 8] ^= 1 << (bit % 8)
        try:
            pairs: list[int] = []
            index = json.loads(raw, object_pairs_hook=lambda p: pairs.append(len(p) - len(dict(p))) or dict(p))
            same = index["weight_map"] == self.index["weight_map"] and not any(pairs)
            harmless = same and index["metadata"]["tp_size"] == 2
        except (ValueError, KeyError, TypeError):
            harmless = False
        return {INDEX: bytes(raw)}, HARMLESS if harmless else DAMAGED


BACKBONE = {
    Files.flip_in_header: 200, Files.truncate: 40, Files.truncate_by_a_little: 20, Files.append: 15,
    Files.oversized_length: 30, Files.oversized_numbers: 40, Files.odd_values: 40, Files.other_dtype: 40,
    Files.reshape: 40, Files.rename: 50, Files.drop: 40, Files.duplicate: 20, Files.swap_names: 60,
    Files.swap_files: 10, Files.shift: 30, Files.point_elsewhere: 40, Files.edit_metadata: 24, Files.flip_in_index: 100,
}  # fmt: skip
DRAFTER = {
    Files.flip_in_header: 60, Files.truncate: 15, Files.oversized_length: 10, Files.oversized_numbers: 15,
    Files.other_dtype: 15, Files.reshape: 15, Files.drop: 15, Files.duplicate: 10, Files.swap_names: 20,
    Files.shift: 10,
}  # fmt: skip


def place(edit: Edit, original: Path, folder: Path) -> None:
    """The original checkpoint with some files replaced."""
    for path in original.iterdir():
        if path.is_file() and path.name not in edit:
            (folder / path.name).symlink_to(path)
    for name, content in edit.items():
        (folder / name).write_bytes(content)


def fingerprint(params) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def run(
    mutations: Iterator[tuple[str, Edit, str]], original: Path, load: Callable[[Path], list[bytes]], work: Path
) -> dict[str, collections.Counter[str]]:
    expected = load(original)
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for number, (kind, edit, meaning) in enumerate(mutations):
        folder = work / str(number)
        folder.mkdir(parents=True)
        place(edit, original, folder)
        start = time.perf_counter()
        got, refusal = None, ""
        try:
            got = load(folder)
        except CheckpointError as error:
            refusal = str(error)
        if refusal:
            assert meaning is not HARMLESS, f"{kind} {number} changes nothing but is refused: {refusal}"
            assert len(refusal) < 4000, kind
        else:
            assert meaning is not DAMAGED, f"{kind} {number} was not noticed"
            assert meaning is not HARMLESS or got == expected, f"{kind} {number} changed what was loaded"
        outcomes[kind]["refused" if refusal else meaning] += 1
        assert time.perf_counter() - start < 20, f"{kind} {number} takes too long"
        shutil.rmtree(folder)
    return outcomes


def mutations_of(files: Files, plan: dict) -> Iterator[tuple[str, Edit, str]]:
    for mutate, count in plan.items():
        for _ in range(count):
            yield mutate.__name__, *mutate(files)


def report(outcomes: dict[str, collections.Counter[str]]) -> collections.Counter[str]:
    total: collections.Counter[str] = collections.Counter()
    for kind, counts in outcomes.items():
        print(f"{kind}: {dict(counts)}")
        total += counts
    print(f"in all: {dict(total)}")
    return total


def test_mutated_backbones(micro, tmp_path, rng):
    config = BackboneConfig.from_folder(micro)
    declared = declared_backbone(config)

    def load(folder: Path) -> list[bytes]:
        return fingerprint(BackboneCheckpoint(folder, config).load(declared, readers=1))

    files = Files(micro, rng)
    assert len(files.shards) > 1
    total = report(run(mutations_of(files, BACKBONE), micro, load, tmp_path))
    assert sum(total.values()) == sum(BACKBONE.values()) > 700
    assert total["refused"] > 500


def test_mutated_drafters(micro, tmp_path, rng):
    folder = micro / "dflash"
    config = DrafterConfig.from_folder(folder)
    declared = declared_drafter(config)

    def load(folder: Path) -> list[bytes]:
        return fingerprint(DrafterCheckpoint(folder, config).load(declared, readers=1))

    total = report(run(mutations_of(Files(folder, rng), DRAFTER), folder, load, tmp_path))
    assert sum(total.values()) == sum(DRAFTER.values())
    assert total["refused"] > 120


def test_oversized_claims_allocate_nothing(micro, tmp_path, rng):
    config, files = BackboneConfig.from_folder(micro), Files(micro, rng)
    plan = {Files.oversized_length: 20, Files.oversized_numbers: 40, Files.odd_values: 20, Files.flip_in_header: 40}
    for number, (_, edit, _) in enumerate(mutations_of(files, plan)):
        folder = tmp_path / str(number)
        folder.mkdir()
        place(edit, micro, folder)
        tracemalloc.start()
        try:
            BackboneCheckpoint(folder, config)
        except CheckpointError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 8 << 20


@pytest.mark.parametrize("name", ["config.json", "dflash/config.json"])
def test_mutated_configurations(micro, tmp_path, rng, name):
    """Flipped bits of a configuration: refused, or another configuration that the tensors fit. Never anything else."""
    raw, outcomes = (micro / name).read_bytes(), collections.Counter()
    for number in range(300):
        broken = bytearray(raw)
        bit = int(rng.integers(8 * len(raw)))
        broken[bit // 8] ^= 1 << (bit % 8)
        folder = tmp_path / str(number)
        (folder / "dflash").mkdir(parents=True)
        place({"config.json": bytes(broken)} if name == "config.json" else {}, micro, folder)
        place({"config.json": bytes(broken)} if name != "config.json" else {}, micro / "dflash", folder / "dflash")
        outcome = "another configuration"
        try:
            config = BackboneConfig.from_folder(folder)
            BackboneCheckpoint(folder, config)
            drafter = DrafterConfig.from_folder(folder / "dflash")
            drafter.check_fits(config)
            DrafterCheckpoint(folder / "dflash", drafter)
        except (CheckpointError, ConfigError):
            outcome = "refused"
        outcomes[outcome] += 1
    print(dict(outcomes))
    assert outcomes["refused"] > 50


def test_no_file_stays_open(micro):
    config = BackboneConfig.from_folder(micro)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        BackboneCheckpoint(micro, config)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * len(Files(micro, np.random.default_rng(0)).shards)
