"""One device's share of a model, as `mimo-jax bench shard` times it."""

import math

import jax
import pytest

from mimo_jax.devices import known_devices
from mimo_jax.evaluation.shard import bench_shard, random_model, share
from mimo_jax.plan import ModelShapes, Plan
from mimo_jax.presets import PRESETS
from sharding.topology import Topology, TopologyError


@pytest.mark.parametrize("preset", ["mimo-v2.5-pro", "mimo-v2-flash"])
def test_a_share_is_as_many_bytes_as_a_device_has(preset):
    """But for routers, which every device has whole and a share only in part."""
    config, drafter = PRESETS[preset].configs()
    device = known_devices()["H200"]
    topology = Topology(8, expert_parallel=8)
    part, part_drafter = share(config, drafter, 8)
    whole = Plan(ModelShapes.of(config, drafter), topology, device, 1, 1024, 8 if drafter else 1).memory()
    mine = Plan(ModelShapes.of(part, part_drafter), Topology(), device, 1, 1024, 8 if drafter else 1).memory()
    for name, nbytes in whole.weights.items():
        if name == "router":
            assert mine.weights[name] == pytest.approx(nbytes / 8, rel=0.01)
            continue
        assert mine.weights[name] == pytest.approx(nbytes, rel=0.02, abs=8e6 * len(config.layers)), name
    assert mine.drafter == pytest.approx(whole.drafter, rel=0.02)
    assert part.moe.experts / part.moe.top_k == config.moe.experts / config.moe.top_k


def test_refuses_what_cannot_be_shared():
    config, drafter = PRESETS["mimo-v2.5-pro"].configs()
    with pytest.raises(ValueError, match="8 experts do not divide by 16"):
        share(config, drafter, 16)
    with pytest.raises(TopologyError):
        share(config, drafter, 7)


def test_says_that_there_is_no_room():
    config, drafter = PRESETS["mimo-v2.5-pro"].configs()
    with pytest.raises(ValueError, match=r"weights take 7.* GB and there are"):
        random_model(*share(config, drafter, 8), "bfloat16")


@pytest.mark.slow
def test_rounds_of_random_weights_are_timed_beside_their_floor():
    part, drafter = share(*PRESETS["nano"].configs(), 2)
    model = random_model(part, drafter, "float32")
    for leaf in jax.tree.leaves(model.params):
        assert bool(jax.numpy.isfinite(leaf.astype("float32")).all())
    [result] = bench_shard(model, known_devices()["H200"], [1], [64], runs=1)
    assert result.milliseconds > 0
    assert math.isfinite(result.milliseconds)
    assert 0 < result.floor_milliseconds < result.milliseconds  # no CPU is as fast
