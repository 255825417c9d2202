"""Plans: the family's known numbers, what jax places, and bounds that behave as bounds."""

import json
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from mimo_jax.cache import backbone_cache, drafter_ring
from mimo_jax.cli import main
from mimo_jax.config import BackboneConfig
from mimo_jax.devices import known_devices, parse_devices
from mimo_jax.floors import expected_distinct, expected_largest, floor
from mimo_jax.model import LoadOptions, load_model
from mimo_jax.plan import COMPONENTS, PAGE, ModelShapes, Plan, default_topology
from mimo_jax.presets import PRESETS, quantization_config
from mimo_jax.synthesize import synthesize
from sharding.topology import Topology, TopologyError

H200 = known_devices()["H200"]
SIXTEEN_AS_ONE = replace(H200, hbm_bytes_per_s=16 * H200.hbm_bytes_per_s)
"""What is cut sixteen ways without a remainder reads as fast as this reads it whole."""


@pytest.fixture(scope="module")
def pro():
    return ModelShapes.of(*PRESETS["mimo-v2.5-pro"].configs())


@pytest.fixture(scope="module")
def pro_alone(pro):
    return ModelShapes.of(pro.config)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    synthesize("tiny", folder)
    return folder


def plan(model, devices=8, *, device=H200, batch=1, context=131072, verify_length=None, topology=None):
    length = verify_length or (model.drafter.block_size if model.drafter else 1)
    return Plan(model, topology or default_topology(devices), device, batch, context, length)


def sums(model, of):
    found = dict.fromkeys([*COMPONENTS, "drafter"], 0)
    for weight in model.weights:
        found[weight.component] += of(weight)
    return found


def test_parameters_of_the_release(pro):
    found = sums(pro, lambda w: w.parameters())
    assert sum(found.values()) - found["drafter"] == 1_021_248_126_336
    assert found["experts"] == 1_000_190_509_056
    assert found["attention"] == 11_670_650_880 + 7_046_430_720 + 7_680
    assert found["dense MLPs"] == 301_989_888
    assert found["router"] == 162_791_424 + 26_496
    assert found["embedding and LM head"] == 2 * 937_426_944
    assert found["norms"] == 866_304


def test_bytes_of_the_release(pro):
    found = {name: count / 1e9 for name, count in sums(pro, lambda w: w.nbytes()).items()}
    stated = {"experts": 531.35, "attention": 25.77, "dense MLPs": 0.30, "router": 0.65, "embedding and LM head": 3.75}
    for name, gigabytes in stated.items():
        assert found[name] == pytest.approx(gigabytes, abs=0.005), name
    assert found["drafter"] == pytest.approx(5.54, abs=0.005)
    assert sum(found.values()) - found["drafter"] == pytest.approx(561.82, abs=0.005)


@pytest.mark.parametrize(("stored", "gigabytes"), [("fp8", 1030.9), (None, 2042.5)])
def test_bytes_of_other_formats(stored, gigabytes):
    fields = dict(PRESETS["mimo-v2.5-pro"].backbone)
    del fields["quantization_config"]
    if stored:
        fields["quantization_config"] = quantization_config(70, stored)
    model = ModelShapes.of(BackboneConfig.from_hf(fields))
    assert sum(w.nbytes() for w in model.weights) / 1e9 == pytest.approx(gigabytes, rel=4e-4)


def test_cache_bytes_of_the_release(pro):
    one = plan(pro, topology=Topology(), context=64 * PAGE).caches()
    more = plan(pro, topology=Topology(), context=65 * PAGE).caches()
    assert more["pages"] - one["pages"] == PAGE * 51_200
    assert more["SWA rings"] == one["SWA rings"] == 60 * (129 + 8 - 1) * 5_120
    assert one["drafter ring"] == 5 * 1032 * 8 * (128 + 128) * 2  # 1024 + 8 - 1 slots, rounded up


def test_distinct_experts():
    for tokens, experts in ((1, 8), (8, 59.5), (64, 284.2), (256, 382.2), (512, 384)):
        assert expected_distinct(384, 8, tokens) == pytest.approx(experts, abs=0.05)
    for tokens, experts in ((1, 2.02), (8, 7.07), (64, 21.3), (1024, 24)):
        chance = expected_distinct(384, 8, tokens) / 384
        assert expected_largest(16, 24, chance) == pytest.approx(experts, rel=0.02)
    assert expected_largest(1, 384, 0.25) == 96


def test_the_largest_count_is_that_of_drawn_ones(rng):
    for parts, trials, chance in ((16, 24, 0.155), (8, 4096, 1 / 8)):
        drawn = rng.binomial(trials, chance, (20_000, parts)).max(axis=1).mean()
        assert expected_largest(parts, trials, chance) == pytest.approx(drawn, rel=0.01)


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 0.516), (8, 1.445), (64, 5.493), (256, 7.259)])
def test_bandwidth_floors_of_weights(pro_alone, batch, milliseconds):
    found = floor(plan(pro_alone, topology=Topology(), device=SIXTEEN_AS_ONE, batch=batch, context=1))
    assert 1e3 * found.bandwidth_seconds == pytest.approx(milliseconds, rel=2e-3)
    assert not found.collectives


@pytest.mark.parametrize(
    ("batch", "context", "milliseconds"), [(1, 131072, 0.088), (8, 131072, 0.70), (64, 4096, 0.21)]
)
def test_bandwidth_floors_of_caches(pro_alone, batch, context, milliseconds):
    found = floor(plan(pro_alone, topology=Topology(), device=SIXTEEN_AS_ONE, batch=batch, context=context))
    read = found.bytes_read["caches"] / SIXTEEN_AS_ONE.hbm_bytes_per_s
    assert 1e3 * read == pytest.approx(milliseconds, rel=0.03)


def test_flops_are_two_a_weight_and_row(pro_alone):
    found = floor(plan(pro_alone, topology=Topology(), batch=2048, context=1))
    assert sum(found.flops.values()) == pytest.approx(2 * 2048 * 40.96e9, rel=5e-3)


def test_verified_rows_reach_experts_as_sequences_do(pro):
    assert floor(plan(pro, batch=1)).experts_reached == pytest.approx(59.5, abs=0.05)
    assert floor(plan(pro, batch=8)).experts_reached == pytest.approx(284.2, abs=0.05)


SPREADS = [
    Topology(2),
    Topology(2, expert_parallel=2),
    Topology(8, 4, 8, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1),
    Topology(8, 4, 4, dp_attention=True, dp_lm_head=True),
]


@pytest.mark.parametrize("topology", SPREADS, ids=str)
def test_weights_are_what_jax_places(tiny, topology):
    loaded = load_model(tiny, LoadOptions(dtype="bfloat16", storage="packed", topology=topology)).params
    model = ModelShapes.of(*PRESETS["tiny"].configs())
    memory = plan(model, topology=topology, context=64).memory()
    for params, planned in ((loaded.backbone, sum(memory.weights.values())), (loaded.drafter, memory.drafter)):
        held: dict = {}
        for leaf in jax.tree.leaves(params):
            for shard in leaf.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        assert set(held.values()) == {planned}
        assert len(held) == topology.tensor_parallel


@pytest.mark.parametrize("topology", SPREADS, ids=str)
def test_caches_are_what_jax_places(topology):
    config, drafter = PRESETS["tiny"].configs()
    assert drafter is not None
    batch = 3 * topology.data_parallel
    held = plan(ModelShapes.of(config, drafter), topology=topology, batch=batch, context=200).caches()
    cache = jax.eval_shape(lambda: backbone_cache(config, batch, 200, 8, "bfloat16", page_size=PAGE))
    ring = jax.eval_shape(lambda: drafter_ring(drafter, batch, 200, "bfloat16"))
    where = jax.NamedSharding(topology.mesh(), jax.P(None, "data", None, "tensor", None))

    def part(kv):
        return sum(int(np.prod(where.shard_shape(x.shape))) * 2 for x in (kv.k, kv.v))

    assert held == {"pages": part(cache.kv["full"]), "SWA rings": part(cache.kv["swa"]), "drafter ring": part(ring)}


def test_kv_heads_are_copied_beyond_their_number(pro):
    for weight in pro.weights:
        if weight.path[-1] in ("k", "v"):
            assert weight.nbytes(Topology(16)) == weight.nbytes(Topology(8)) == weight.nbytes() // 8
    over_16 = plan(pro, topology=Topology(16, expert_parallel=16))
    assert over_16.caches() == plan(pro, 8).caches()


def test_a_heavier_load_never_lowers_the_floor(pro):
    for devices in (8, 16):
        floors = [floor(plan(pro, devices, batch=batch)) for batch in (1, 2, 3, 4, 7, 8, 31, 64, 255, 256)]
        for name in ("bandwidth_seconds", "flops_seconds", "interconnect_seconds", "seconds"):
            values = [getattr(f, name) for f in floors]
            assert values == sorted(values), name
        assert floor(plan(pro, devices, context=4096)).seconds < floors[0].seconds
        assert floor(plan(pro, devices, verify_length=4)).seconds < floors[0].seconds


def test_the_slowest_device_has_no_less_than_the_mean(pro):
    whole = floor(plan(pro, topology=Topology(8, expert_parallel=8)))
    sliced = floor(plan(pro, topology=Topology(8)))
    assert whole.bytes_read["experts"] > sliced.bytes_read["experts"]
    assert sliced.experts_of_slowest == pytest.approx(sliced.experts_reached)
    assert sliced.bytes_read["experts"] == pytest.approx(sliced.experts_reached * 69 * 20_054_016 / 8)


@pytest.mark.parametrize("devices", [8, 16])
def test_what_is_said_to_fit_fits_and_no_more_does(pro, devices):
    crowded = plan(pro, devices, batch=384)
    context = crowded.longest_context()
    assert 0 < context < pro.config.max_positions
    assert context % PAGE == 0
    assert replace(crowded, context=context).fits()
    assert not replace(crowded, context=context + PAGE).fits()
    batch, groups = crowded.largest_batch(), crowded.topology.data_parallel
    assert replace(crowded, batch=batch).fits()
    assert not replace(crowded, batch=batch + groups).fits()
    assert plan(pro, devices).longest_context() == pro.config.max_positions


def test_collectives_of_one_server(pro):
    found = floor(plan(pro, 8)).collectives
    assert sum(c.count for c in found) == 70 + 1 + 69 + 1 + 1 + (1 + 5 + 5 + 1)
    attention = next(c for c in found if c.what == "attention output")
    assert attention.payload_bytes == 8 * 6144 * 2
    assert attention.sent_bytes == 2 * 7 / 8 * attention.payload_bytes
    assert attention.seconds == pytest.approx(70 * attention.sent_bytes / 450e9)


def test_collectives_beyond_a_server(pro):
    """Two servers of eight: a sum over sixteen crosses the network with an eighth of its bytes."""
    over_16 = floor(plan(pro, topology=Topology(16, expert_parallel=16))).collectives
    attention = next(c for c in over_16 if c.what == "attention output")
    near, far = 2 * 7 / 8 * attention.payload_bytes, 2 * 1 / 2 * attention.payload_bytes / 8
    assert attention.seconds == pytest.approx(70 * (near / 450e9 + far / 50e9))
    few, many = floor(plan(pro, 16)), floor(plan(pro, 16, batch=256))
    assert {c.kind for c in few.collectives} == {"all-reduce", "all-gather", "reduce-scatter"}
    assert "all-to-all" in {c.kind for c in many.collectives}
    assert few.interconnect_seconds < sum(c.seconds for c in few.collectives)
    assert many.interconnect_seconds == pytest.approx(sum(c.seconds for c in many.collectives))


def test_the_default_topologies():
    assert default_topology(8) == Topology(8, expert_parallel=8)
    release = {"dp_attention": True, "dp_lm_head": True, "dense_tensor_parallel": 1}
    assert default_topology(16) == Topology(16, 2, 16, **release)
    assert default_topology(64) == Topology(64, 8, 64, **release)
    assert default_topology(12) == Topology(12, expert_parallel=12)


def test_loads_and_topologies_that_cannot_be(pro, pro_alone):
    with pytest.raises(TopologyError, match="128 heads"):
        plan(pro, 12)
    with pytest.raises(ValueError, match="1 to 8, the drafter's block, not 9"):
        plan(pro, verify_length=9)
    with pytest.raises(ValueError, match="no drafter"):
        plan(pro_alone, verify_length=2)
    with pytest.raises(ValueError, match="beyond the model's 1,048,576"):
        plan(pro, context=1_048_577)


def test_every_device_has_a_source():
    for device in known_devices().values():
        assert "NVIDIA" in device.source
        assert device.memory_bytes > 40e9
    assert parse_devices("8 x h200", known_devices()) == (8, H200)


COMMAND = ["plan", "--preset", "mimo-v2.5-pro", "--devices"]


def test_json_is_the_table(capsys, tmp_path):
    picture = tmp_path / "floors.png"
    given = [*COMMAND, "16xH200", "--batch", "4", "--accepted-length", "5.56", "--scaling", "--plot", str(picture)]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*given, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert "TP 16, EP 16, DP 2, DP attention, DP LM head, dense-MLP TP 1 (by default); mesh data 2 x tensor 8" in shown
    memory, least = described["memory"], described["round"]
    parts = [*memory["weights"].values(), memory["drafter"], *memory["caches"].values()]
    parts += memory["workspace_estimate"].values()
    assert sum(parts) == memory["used"] == memory["capacity"] - memory["free"]
    for count in (*parts, memory["used"], memory["free"], *least["bytes_read"].values()):
        assert f"{count / 1e9:,.3f}" in shown
    for name in ("bandwidth", "flops", "interconnect", "floor"):
        assert f"{1e3 * least[f'{name}_seconds']:,.3f}" in shown
    for one in least["collectives"]:
        assert one["what"] in shown
    assert f"{described['largest_batch']:,}" in shown
    assert f"{described['tokens_per_second_at_most']:,.0f} in all" in shown
    assert described["tokens_per_second_at_most"] == pytest.approx(4 * 5.56 / least["floor_seconds"])
    for entry in described["scaling"]:
        for cell in (*entry["whole"], *entry["sliced"]):
            assert f"{1e3 * cell['floor_seconds']:,.3f}" in shown
        assert f"{entry['devices']} devices: whole experts" in shown
    eight, sixteen = described["scaling"][:2]
    assert sixteen["whole"][2]["floor_seconds"] == least["floor_seconds"]
    first = next(i for i, cell in enumerate(eight["whole"]) if cell["batch"] == eight["crossover"])
    for i, (one, other) in enumerate(zip(eight["whole"], eight["sliced"], strict=True)):
        near = one["floor_seconds"] <= 1.05 * other["floor_seconds"]
        assert near or i < first
        assert not (near and i == first - 1)


def test_a_folder_needs_only_its_configurations(tiny, tmp_path, capsys):
    (tmp_path / "dflash").mkdir()
    for name in ("config.json", "dflash/config.json"):
        shutil.copy(tiny / name, tmp_path / name)
    given = ["plan", "--model", str(tmp_path), "--devices", "2xL40S", "--ep-size", "1", "--context", "4096", "--json"]
    assert main(given) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["topology"]["expert_parallel"] == 1
    assert described["whole_model_bytes"]["drafter"] > 0


def test_device_files_add_and_replace(tmp_path, capsys):
    entry = json.loads(json.dumps({k: v for k, v in vars(H200).items() if k != "name"}))
    file = tmp_path / "more.json"
    file.write_text(json.dumps({"H200": entry | {"memory_bytes": 1e9}, "Mine": entry | {"network_bytes_per_s": None}}))
    given = [*COMMAND, "8xMine", "--device-file", str(file)]
    assert main(given) == 0
    assert "8 x Mine" in capsys.readouterr().out
    assert known_devices(file)["H200"].memory_bytes == 1e9
    for wrong, said in (
        ({"Mine": {}}, "Mine lacks memory_bytes"),
        ({"Mine": entry | {"colour": 1}}, "Mine has an unknown key, colour"),
        ({"Mine": entry | {"memory_bytes": "big"}}, "memory_bytes must be a number above 0, not 'big'"),
        ({"Mine": entry | {"bf16_flops": None}}, "bf16_flops must be a number above 0, not None"),
        ({"Mine": entry | {"fp8_flops": -1}}, "fp8_flops must be a number above 0 or null, not -1"),
        ({"Mine": entry | {"linked_devices": 1.5}}, "linked_devices must be a whole number"),
        ({"Mine": 3}, "Mine must be an object with memory_bytes"),
        ([], "expected an object of devices"),
    ):
        file.write_text(json.dumps(wrong))
        assert main(given) == 2
        assert said in capsys.readouterr().err
    file.write_text("{")
    assert main(given) == 2
    assert "more.json: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["8xH900"], "no device 'H900' is known; there are A100, B200, GB200, H100, H200, L40S"),
        (["H200"], "COUNTxNAME, such as 8xH200, not 'H200'"),
        (["12xH200"], "128 heads of full attention cannot be cut into 12"),
        (["8xH200", "--tp-size", "16"], "8 devices and --tp-size 16; they must agree"),
        (["8xH200", "--ep-size", "3"], "expert_parallel 3"),
        (["8xH200", "--accepted-length", "9"], "between 1 and the verify length, 8, and is not 9"),
        (["8xH200", "--accepted-length", "0"], "and is not 0"),
        (["8xH200", "--plot", "/nowhere/floors.png"], "folder /nowhere does not exist"),
        (
            ["4xH200"],
            "too few. Neither a smaller batch nor a shorter context helps alone. What helps: --devices 8xH200.",
        ),
        (["8xH200", "--batch", "100"], r"--context \d+ at most at this batch, or --batch \d+ at most at this context"),
    ],
)
def test_what_cannot_be_is_said(capsys, options, said):
    assert main([*COMMAND, *options]) == 2
    assert re.search(said, capsys.readouterr().err)
