"""Loading in pieces: the same parameters whatever their size, and a bound on what the host holds."""

import json
import os
import subprocess
import sys

import jax
import pytest

from mimo_jax import device_arrays
from mimo_jax.cli import main
from mimo_jax.model import LoadOptions, load_model
from mimo_jax.presets import PRESETS, Preset
from mimo_jax.synthesize import synthesize
from sharding.topology import Topology
from tests.checkpoint_files import assert_same

BIG = Preset(
    PRESETS["tiny"].backbone
    | {
        "hidden_size": 1024,
        "num_hidden_layers": 14,
        "hybrid_layer_pattern": [0] + [1] * 13,
        "moe_layer_freq": [0] + [1] * 13,
        "n_routed_experts": 32,
        "moe_intermediate_size": 1024,
    },
    None,
    mtp_layers=0,
)
"""One leaf of it, gate and up of 416 experts, is 436 MB."""

MEASURE = """
import sys
from pathlib import Path

from mimo_jax.model import LoadOptions, load_model
from sharding.topology import Topology

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

before = memory("VmRSS")
import jax

devices, snapshot = int(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None
if snapshot:
    import mimo_jax.snapshot
    before = memory("VmRSS")
topology = Topology(devices, expert_parallel=devices)
model = load_model(Path(sys.argv[1]), LoadOptions(storage="packed", topology=topology, snapshot=snapshot))
owned = sum(s.data.nbytes for leaf in jax.tree.leaves(model.params) for s in leaf.addressable_shards)
print(before, owned, memory("VmHWM"))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "tiny"
    synthesize("tiny", folder, seed=7)
    return folder


@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_any_pieces_give_the_same_parameters(tiny, monkeypatch, storage):
    """On a mesh where devices own some experts, some columns or all of a weight."""
    topology = Topology(4, 2, 2, dp_attention=True, dp_lm_head=True)
    options = LoadOptions(storage=storage, topology=topology)
    whole = load_model(tiny, options).params
    monkeypatch.setattr(device_arrays, "PIECE_BYTES", 50_000)
    monkeypatch.setattr(device_arrays, "STRIP_BYTES", 9_000)
    pieces = load_model(tiny, options).params
    assert_same(vars(pieces), vars(whole))
    assert [x.sharding for x in jax.tree.leaves(pieces)] == [x.sharding for x in jax.tree.leaves(whole)]


def test_progress_ends_where_it_said(tiny):
    """Also where devices have copies of KV heads, whose rows are read for each."""

    def read(topology):
        told = {}
        load_model(tiny, LoadOptions(topology=topology), lambda name, *counts: told.setdefault(name, []).append(counts))
        for counts in told.values():
            done, totals = zip(*counts, strict=True)
            assert list(done) == sorted(done)
            assert {done[-1]} == set(totals)
        return {name: counts[-1][0] for name, counts in told.items()}

    once, copied = read(Topology()), read(Topology(4, expert_parallel=4, dense_tensor_parallel=1))
    assert set(once) == {"backbone", "drafter"}
    assert all(copied[name] > once[name] for name in once)


def test_bench_load(tiny, capsys, tmp_path):
    command = ["bench", "load", "--model", tiny, "--snapshot", tmp_path / "snapshot", "--runs", 2]
    assert main([str(c) for c in (*command, "--json", tmp_path / "load.json")]) == 0
    assert "page cache warm" in capsys.readouterr().out
    raw, load, restore = json.loads((tmp_path / "load.json").read_text())["load"]
    assert [r["what"] for r in (raw, load, restore)] == ["raw read", "load", "restore"]
    assert raw["nbytes"] == load["nbytes"] <= sum(p.stat().st_size for p in tiny.rglob("*.safetensors"))
    assert all(r["gigabytes_per_second"] > 0 and r["seconds"]["runs"] == 2 for r in (raw, load, restore))
    assert load["owned_bytes"] == restore["owned_bytes"]


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "big"
    synthesize(BIG, folder, seed=1)
    return folder


def measured(*arguments, devices):
    """Bytes of host memory: after imports, that devices own, at most."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        capture_output=True,
        text=True,
        check=True,
    )
    before, owned, peak = map(int, done.stdout.split())
    print(f"imports {before:,}, owned {owned:,}, peak {peak:,}: {peak - before - owned:,} more")
    assert owned > 600e6
    return before, owned, peak


has_status = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")


@pytest.mark.slow
@has_status
@pytest.mark.parametrize("devices", [1, 4])
def test_the_host_holds_what_its_devices_own_and_little_more(big, devices):
    before, owned, peak = measured(big, devices, devices=devices)
    assert peak < before + owned + 256e6


@pytest.mark.slow
@has_status
def test_a_snapshot_takes_little_more(big, tmp_path):
    """To be made, and to be restored: the largest array's part of a device, and what else Orbax holds."""
    for _ in ("made", "restored"):
        before, owned, peak = measured(big, 4, tmp_path / "snapshot", devices=4)
        assert peak < before + owned + 512e6
