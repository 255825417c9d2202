"""The release at its real size, compiled from shapes for its own mesh: what devices hold, and what they exchange."""

import json
import math
import time
from collections import Counter

import jax
import pytest

from mimo_jax.abstract import abstract_model
from mimo_jax.cli import main
from mimo_jax.devices import known_devices
from mimo_jax.layer_loops import stretches
from mimo_jax.plan import ModelShapes, Plan
from mimo_jax.presets import PRESETS
from mimo_jax.request import SamplingParams, batch_requests
from mimo_jax.speculative import decode
from sharding.compiled import collectives
from sharding.topology import Topology

RELEASE = Topology(16, 2, 16, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1)
WHOLE_EXPERTS = Topology(8, expert_parallel=8)
SLICED_EXPERTS = Topology(8)
BATCH, CAPACITY = 2, 4096


def configs():
    return PRESETS["mimo-v2.5-pro"].configs()


def arguments(topology):
    """The model, and what its decode program takes, as shapes."""
    config, drafter = configs()
    model = abstract_model(config, drafter, "bfloat16", topology, topology.mesh())
    asked = batch_requests([[1]] * BATCH, [SamplingParams()] * BATCH, (), config.vocab_size)
    return model, model.state_shapes(BATCH, CAPACITY), model.shaped(asked)


def held(tree):
    """Bytes of a tree that one device has."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("topology", [RELEASE, WHOLE_EXPERTS, SLICED_EXPERTS])
def test_a_device_holds_what_the_plan_says(topology):
    model, state, _ = arguments(topology)
    memory = Plan(ModelShapes.of(*configs()), topology, known_devices()["H200"], BATCH, CAPACITY, 8).memory()
    assert held(model.params) == sum(memory.weights.values()) + memory.drafter
    pages = state.cache.kv["full"]
    kept = held((pages.k, pages.v, state.cache.kv["swa"], state.ring))
    assert kept <= sum(memory.caches.values()) <= kept * 1.05  # the plan has room for the round that is under way


def compiled(topology):
    model, state, requests = arguments(topology)
    begun = time.perf_counter()
    program = model.lowered(decode, (state, requests), {"rounds": 8, "verify_length": 8}).compile()
    return program, time.perf_counter() - begun, held((model.params, state, requests))


@pytest.mark.slow
def test_the_release_on_sixteen_devices():
    """Two groups of eight: every collective is one that the model asks for, and none of them moves weights."""
    program, seconds, argument_bytes = compiled(RELEASE)
    print(f"{seconds:.1f} s to trace and compile")
    analysis = program.memory_analysis()
    assert analysis is not None
    assert analysis.argument_size_in_bytes == argument_bytes

    found = list(collectives(program.as_text() or ""))
    config, drafter = configs()
    assert drafter is not None
    layers = [run for stretch in stretches(config.layers, drafter.target_layer_ids) for run in stretch[0]]
    moe = sum(run.kind.mlp == "moe" for run in layers)
    counted = Counter(kind for kind, _ in found)
    assert counted["reduce-scatter"] == moe  # experts' sums to the group that asked
    # attention, and experts' sums within a group; embeddings of rows and anchor; the drafter's attention and MLP;
    # whether anybody goes on
    assert counted["all-reduce"] == len(layers) + moe + 2 + 2 + 1
    # rows, ids and weights of both groups; largest logits and where they stand, twice; truncation's logits, where asked
    # for; what the host reads
    assert counted["all-gather"] == 3 * moe + 4 + 1 + 5
    assert set(counted) == {"reduce-scatter", "all-reduce", "all-gather"}
    one_expert_matrix = config.moe.intermediate * config.hidden_size // 2
    assert max(size for _, size in found) < one_expert_matrix


@pytest.mark.slow
def test_a_restart_finds_the_round_in_the_compilation_cache(tmp_path, capsys):
    assert main(["bench", "compile", "--runs", "1", "--json", str(tmp_path / "compile.json")]) == 0
    shown = capsys.readouterr().out
    print(shown)
    assert "mimo-v2.5-pro on 16 devices: TP 16, EP 16, DP 2, DP attention, DP LM head" in shown
    empty, filled = json.loads((tmp_path / "compile.json").read_text())["compile"]
    assert (empty["cache_hits"], empty["cache_misses"]) == (0, 1)
    assert (filled["cache_hits"], filled["cache_misses"]) == (1, 0)
    assert empty["cpu_seconds"]["median"] < 2 * 60  # a minute of two cores
    assert filled["compile_seconds"]["median"] < empty["compile_seconds"]["median"] / 3


def test_what_cannot_be_compiled_is_said_at_once(capsys):
    assert main(["bench", "compile", "--devices", "12"]) == 2
    assert "128 heads of full attention cannot be cut into 12" in capsys.readouterr().err
