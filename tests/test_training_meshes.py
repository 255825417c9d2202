"""Training on meshes: the steps of one device, by sequences and by parts of them, and runs that change their mesh."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest

from mimo_jax.backbone import Backbone
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared
from mimo_jax.training import TrainingError
from mimo_jax.training.backbone_training import BackboneTrainer, backbone_step
from mimo_jax.training.drafter_training import DrafterTrainer, drafter_step
from mimo_jax.training.groups import Groups
from mimo_jax.training.initialization import initial_params
from mimo_jax.training.loop import Run
from mimo_jax.training.optimizers import OptimizerConfig, make_optimizer
from sharding.topology import Topology
from tests.models import random_params, tiny_configs

STEPS, BATCH, LENGTH = 2, 4, 20
ONE = Topology()
TENSOR = Topology(2)
BOTH = Topology(4, 2, 4, dp_attention=True)


def configs():
    """Heads, experts and vocabulary that four devices can share; no even share of tokens is a whole number."""
    config, drafter = tiny_configs(vocab=64)
    config = replace(config, full=replace(config.full, kv_heads=2), moe=replace(config.moe, experts=12))
    config = replace(config, layers=(config.layers[0], *config.layers[2:4]))
    return config, replace(drafter, target_layer_ids=(0, 2), num_target_layers=3)


def groups_of(topology: Topology, cut_sequences: bool = False) -> Groups:
    return Groups(topology, topology.mesh(), cut_sequences)


def backbone_trainer(groups: Groups) -> BackboneTrainer:
    backbone = Declared(lambda: Backbone(configs()[0], "float32", groups.topology))
    optimizer = make_optimizer(backbone.axes, OptimizerConfig(learning_rate=1e-2, warmup=1), 10)
    return BackboneTrainer(backbone, optimizer, qat=False, groups=groups)


@cache
def drafter_trainer(groups: Groups, **settings) -> DrafterTrainer:
    config, drafter_config = configs()
    backbone = Declared(lambda: Backbone(config, "float32", groups.topology))
    drafter = Declared(lambda: Drafter(drafter_config, "float32", groups.topology))
    optimizer = make_optimizer(drafter.axes, OptimizerConfig(learning_rate=1e-2, warmup=1), 10)
    return DrafterTrainer(backbone, drafter, optimizer, anchors=16, groups=groups, **settings)


def ids_of(step: int, length: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 64, (BATCH, length)).astype(np.int32)


def backbone_steps(groups: Groups):
    trainer = backbone_trainer(groups)
    state = trainer.start(initial_params(trainer.backbone, 3, seed=0))
    found = []
    for step in range(STEPS):
        state, metrics = backbone_step(trainer, state, {"ids": ids_of(step, LENGTH + 1)})
        found.append(metrics)
    return jax.tree.map(np.asarray, (state.params, found)), state


def drafter_step_of(groups: Groups, **settings):
    """The state before the first step, and the step as a function of the state and its number."""
    trainer = drafter_trainer(groups, **settings)
    frozen = groups.placed(random_params(trainer.backbone, 3), trainer.backbone.axes)

    def step(state, number):
        answer = np.random.default_rng(number + 9).random((BATCH, LENGTH)) < 0.9
        batch = {"ids": ids_of(number, LENGTH), "answer": answer, "lengths": np.full(BATCH, LENGTH, np.int32)}
        if not groups.cut_sequences:  # two documents a row
            batch["positions"] = np.broadcast_to(np.arange(LENGTH, dtype=np.int32) % 12, (BATCH, LENGTH))
        return drafter_step(trainer, state, batch, frozen, jax.random.key(number))

    return trainer.start(initial_params(trainer.drafter, 2, seed=0)), step


def drafter_steps(groups: Groups):
    state, step = drafter_step_of(groups)
    found = []
    for number in range(STEPS):
        state, metrics = step(state, number)
        found.append(metrics)
    return jax.tree.map(np.asarray, (state.params, found))


@pytest.fixture(scope="module")
def backbone_alone():
    return backbone_steps(groups_of(ONE))[0]


@pytest.fixture(scope="module")
def drafter_alone():
    return drafter_steps(groups_of(ONE))


same = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=2e-3, atol=3e-5))


@pytest.mark.slow
@pytest.mark.parametrize("cut_sequences", [True, False])
def test_a_backbone_learns_what_it_would_on_one_device(backbone_alone, cut_sequences):
    """Loss, accuracy, the experts' load, and parameters after Muon's steps on matrices that devices have parts of."""
    same(backbone_steps(groups_of(BOTH, cut_sequences))[0], backbone_alone)


@pytest.mark.slow
def test_a_drafter_learns_what_it_would_on_one_device(drafter_alone):
    """The anchors are the same, too: they do not depend on the mesh where sequences are whole."""
    same(drafter_steps(groups_of(BOTH)), drafter_alone)


@pytest.mark.slow
def test_a_drafter_learns_from_parts_of_sequences():
    """Anchors are each device's own, so steps are none of one device; the loss falls, and heads are shared, too."""
    state, step = drafter_step_of(groups_of(BOTH, cut_sequences=True), edges="exchange")
    losses = []
    for _ in range(10):
        state, metrics = step(state, 0)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3


def test_each_device_keeps_its_share():
    """Parameters are cut over `tensor`; what the optimiser keeps of matrices, over the groups, too."""
    groups = groups_of(BOTH)
    trainer = drafter_trainer(groups)
    state = trainer.start(initial_params(trainer.drafter, 2, seed=0))
    assert state.params["gate"].sharding.shard_shape((2, 40, 32)) == (2, 20, 32)
    momenta = [x for x in jax.tree.leaves(state.optimizer) if x.shape == (2, 40, 32)]
    assert momenta
    assert all(x.sharding.shard_shape(x.shape) == (2, 20, 16) for x in momenta)
    alone = sum(x.nbytes for x in jax.tree.leaves(state.optimizer))
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.optimizer))
    assert here < alone * 0.45  # a quarter of most, half of what is not cut over `tensor`


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path, drafter_alone):
    """A step on one mesh and one on another are two on one device; every part is read where it goes."""
    got: Any = None
    for steps, topology in enumerate((BOTH, TENSOR), 1):
        state, step = drafter_step_of(groups_of(topology))
        arguments = {"steps": steps, "checkpoint_every": 1, "tokens_per_step": 1, "title": "test"}
        got = Run(tmp_path / "moving", {}).train(state, step, lambda number: number, **arguments)
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(got)} == {topology.tensor_parallel}
    same(jax.tree.map(np.asarray, got.params), drafter_alone[0])


def test_what_groups_cannot_share():
    with pytest.raises(TrainingError, match="5 rows cannot be shared equally by 2 data-parallel groups"):
        groups_of(BOTH).check(5, 16)
    with pytest.raises(TrainingError, match="15 positions cannot be shared equally by 2"):
        groups_of(BOTH, cut_sequences=True).check(4, 15)
    with pytest.raises(TrainingError, match="2 KV heads cannot be trained on 4 devices"):
        groups_of(Topology(4)).check_heads(configs()[1].attention)
