"""The plan of a drafter's training step: its arguments are those of the compiled program."""

import json

import pytest

from mimo_jax.cli import main
from mimo_jax.devices import known_devices
from mimo_jax.plan import default_topology
from mimo_jax.presets import PRESETS
from mimo_jax.training import TrainingError
from mimo_jax.training.drafter_training import drafter_step
from mimo_jax.training.step_plan import StepPlan
from sharding.topology import Topology, TopologyError
from tests.checkpoint_files import MICRO

H200 = known_devices()["H200"]
TWO_BY_TWO = Topology(4, 2, 4, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1)


def plan_of(preset: str, topology: Topology, length: int, anchors: int, **more) -> StepPlan:
    config, drafter = PRESETS[preset].configs()
    assert drafter is not None
    return StepPlan(config, drafter, topology, H200, 1, length, anchors, **more)


def compiled(plan: StepPlan):
    trainer, given = plan.program(plan.topology.mesh())
    return drafter_step.lower(trainer, *given).compile()


def final_norm(plan: StepPlan) -> int:
    """Bytes of the one weight of a backbone that its drafter's training does without, which the compiler leaves out."""
    return 2 * plan.config.hidden_size


@pytest.mark.slow
def test_arguments_are_the_compiled_programs():
    """Packed experts and linears, float32 parameters, momenta cut over the groups."""
    config, drafter = MICRO.configs()
    assert drafter is not None
    plan = StepPlan(config, drafter, TWO_BY_TWO, H200, 1, 64, 16)
    analysis = compiled(plan).memory_analysis()
    assert analysis is not None
    assert analysis.argument_size_in_bytes == sum(plan.arguments.values()) - final_norm(plan)


def test_the_release_on_a_pod(capsys):
    """2.77B parameters in float32, Muon's momentum, and a packed backbone of 1.02T, on 64 devices."""
    plan = plan_of("mimo-v2.5-pro", default_topology(64), 131072, 4096)
    matrices, fc = 5 * 6144 * (2 * 16384 + 2 * 1024 + 3 * 16384), 5 * 6144 * 6144
    vectors, of_heads, sinks = (3 + 2 * 5) * 6144, 2 * 5 * 128, 5 * 128
    assert matrices + fc + vectors + of_heads + sinks == 2_768_316_288 + 6144  # and the mask vector
    # heads and columns are cut over the 8 devices of a group
    assert plan.arguments["drafter, float32"] == 4 * ((matrices + sinks) // 8 + fc + vectors + of_heads)
    # what is kept of them over the 8 groups, too; one momentum of matrices, two of the rest
    kept = 4 * (matrices // 64 + fc // 8 + 2 * (vectors // 8 + of_heads + sinks // 8))
    assert plan.arguments["optimiser"] == pytest.approx(kept, abs=64)
    assert plan.arguments["backbone"] * 64 > 500e9

    assert main(["train", "plan", "--devices", "64xH200", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["arguments"] == plan.arguments
    assert described["fits"]
    assert main(["train", "plan", "--devices", "64xH200"]) == 0
    assert "signals/s" in capsys.readouterr().out
    assert main(["train", "plan", "--devices", "8xH200", "--batch", "8"]) == 2
    assert "does not fit: each of 8 x H200" in capsys.readouterr().err


def test_what_cannot_be_planned():
    with pytest.raises(TrainingError, match="1000 positions cannot be shared equally by 16"):
        plan_of("mimo-v2.5-pro", default_topology(128), 1000, 64)
    with pytest.raises(TopologyError, match="cannot be cut into 12"):
        plan_of("mimo-v2.5-pro", Topology(12), 1024, 64)
    with pytest.raises(TrainingError, match="8 KV heads cannot be trained on 16"):
        plan_of("mimo-v2.5-pro", Topology(16, expert_parallel=16), 1024, 64)
