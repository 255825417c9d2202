"""Blocks of sequences that are cut over devices: each is what it is in the whole sequence, and little is sent."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.backbone import Backbone
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared
from mimo_jax.training import TrainingError
from mimo_jax.training.anchors import candidates, draw_anchors
from mimo_jax.training.block_losses import Loss
from mimo_jax.training.drafter_training import DrafterTrainer, Text, block_loss, read
from mimo_jax.training.groups import Groups
from mimo_jax.training.local_shard import Edges, drawable, skipped
from mimo_jax.training.optimizers import OptimizerConfig, make_optimizer
from sharding.compiled import collectives
from sharding.topology import Topology
from tests.models import random_params, tiny_configs

BATCH, LENGTH, COUNT = 2, 160, 8
REPLICATED, CUT = jax.P(), jax.P(None, "data")


def trainer_of(shards: int, edges: Edges = "exchange", window: int | None = 10, loss: Loss = "hard") -> DrafterTrainer:
    """A drafter on sequences that are cut into so many parts; the vocabulary is whole everywhere."""
    config, drafter_config = tiny_configs(drafter_window=window)
    topology = Topology(shards, shards, dp_attention=True, dp_lm_head=True)
    groups = Groups(topology, topology.mesh(), cut_sequences=True)
    backbone = Declared(lambda: Backbone(config, "float32", topology))
    drafter = Declared(lambda: Drafter(drafter_config, "float32", topology))
    optimizer = make_optimizer(drafter.axes, OptimizerConfig(), 10)
    return DrafterTrainer(backbone, drafter, optimizer, loss=loss, blocks_at_once=8, groups=groups, edges=edges)


@pytest.fixture(scope="module")
def whole(given):
    """Loss and gradients on one device, for drafters of any window."""
    return cache(lambda window: jax.jit(jax.value_and_grad(loss_of(trainer_of(1, window=window), given))))


@pytest.fixture(scope="module")
def given():
    """Parameters of a drafter and of its backbone, and a text."""
    trainer, rng = trainer_of(1), np.random.default_rng(5)
    drafter, backbone = random_params(trainer.drafter, 1, 1.5), random_params(trainer.backbone, 2, 1.5)
    # a vocabulary matters here, layers do not
    backbone["layers"] = jax.tree.map(jnp.zeros_like, backbone["layers"])
    captured = jnp.asarray(rng.standard_normal((BATCH, LENGTH, 3, 32)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 61, (BATCH, LENGTH)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), ids.shape)
    answer = jnp.asarray(rng.random((BATCH, LENGTH)) < 0.8)
    return drafter, backbone, Text(ids, answer, positions, captured, captured[:, :, -1])


def drawing(trainer: DrafterTrainer):
    """The function of a key and a text that draws the anchors of all parts, side by side: [batch, COUNT]."""
    groups = trainer.groups
    skip = skipped(trainer.drafter.module.config, groups, trainer.edges)
    count = COUNT // groups.together.width

    def draw(key, text):
        candidate = candidates("random", 8, text.answer, text.positions) & drawable(skip, groups, LENGTH)
        return draw_anchors(key, candidate, count, groups)

    return jax.jit(groups.on_all(draw, (REPLICATED, Text.lies(groups)), (CUT, CUT)))


def loss_of(trainer: DrafterTrainer, given):
    """The loss as a function of the drafter's parameters, the anchors and which of them count."""
    drafter, backbone, text = given
    groups = trainer.groups
    lie = groups.specs(drafter, trainer.drafter.axes), groups.specs(backbone, trainer.backbone.axes)

    def here(params, backbone, *rest):
        return block_loss(trainer, trainer.backbone.bind(backbone), params, *rest)[0]

    on_all = groups.on_all(here, (*lie, Text.lies(groups), CUT, CUT), REPLICATED)
    return lambda params, anchors, drawn: on_all(params, backbone, text, anchors, drawn)


@pytest.mark.parametrize(
    ("shards", "edges", "window"),
    [
        (8, "exchange", 10),
        pytest.param(8, "skip", 10, marks=pytest.mark.slow),
        pytest.param(8, "exchange", 50, marks=pytest.mark.slow),
    ],
)
def test_a_block_of_a_part_is_that_of_the_whole(given, whole, shards, edges, window):
    """Block by block, its loss and its gradients; windows that reach over several parts, too."""
    trainer, params = trainer_of(shards, edges, window), given[0]
    anchors, drawn = map(np.asarray, drawing(trainer)(jax.random.key(0), given[2]))
    assert drawn.sum() > COUNT
    parts = jax.jit(jax.value_and_grad(loss_of(trainer, given)))
    seen = set()
    for alone in np.eye(BATCH * COUNT, dtype=bool).reshape(-1, BATCH, COUNT):
        expected, got = (run(params, anchors, drawn & alone) for run in (whole(window), parts))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6), got, expected)
        seen.add(float(got[0]))
    assert len(seen) > COUNT


@pytest.mark.slow
@pytest.mark.parametrize("edges", ["exchange", "skip"])
def test_distillation_follows_the_backbone_beyond_a_part(given, edges):
    """Labels of a part's last positions are the next part's, and what the backbone says of them is its, too."""
    drafter, backbone, text = given
    batch = {"ids": text.ids, "answer": text.answer, "lengths": jnp.full(BATCH, LENGTH, jnp.int32)}
    anchors, drawn = map(np.asarray, drawing(trainer_of(8, edges))(jax.random.key(1), text))
    found = []
    for shards in (1, 8):
        trainer = trainer_of(shards, edges, loss="kd")
        groups = trainer.groups
        lie = groups.specs(backbone, trainer.backbone.axes), REPLICATED
        text = jax.jit(groups.on_all(partial(read, trainer), lie, Text.lies(groups)))(backbone, batch)
        loss = loss_of(trainer, (drafter, backbone, text))
        found.append(jax.jit(jax.value_and_grad(loss))(drafter, anchors, drawn))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6), *found)


@pytest.mark.parametrize(("shards", "edges"), [(4, "exchange"), (4, "skip"), (1, "skip")])
def test_devices_draw_from_their_own_positions(given, shards, edges):
    """All that may be drawn is drawn in the end, each part's share by its device, and nothing else."""
    trainer, answer = trainer_of(shards, edges), np.asarray(given[2].answer)
    part, seen, draw = LENGTH // shards, set(), drawing(trainer)
    for seed in range(200):
        anchors, drawn = map(np.asarray, draw(jax.random.key(seed), given[2]))
        assert drawn.all()
        assert (anchors // part == np.arange(shards).repeat(COUNT // shards)).all()
        assert all(len(set(row)) == COUNT for row in anchors.tolist())
        seen |= set(anchors[0].tolist())
    candidates = {t for t in range(LENGTH - 1) if answer[0, t] and answer[0, t + 1]}
    if edges == "skip":
        candidates = {t for t in candidates if t < part or t % part >= 9}
        candidates = {t for t in candidates if t >= LENGTH - part or t % part < part - 7}
    assert seen == candidates


SUMS = ("all-reduce", 4 * (4 + 2 * 7))


def windows(edges: Edges) -> list[tuple[str, int]]:
    """The message with the window of context keys and values, if there is one."""
    return [("collective-permute", 4 * 2 * BATCH * 9 * 2 * (8 + 8))] if edges == "exchange" else []


def sent(function, *arguments) -> list[tuple[str, int]]:
    """Kind and bytes of everything that the compiled function sends."""
    return list(collectives(jax.jit(function).lower(*arguments).compile().as_text() or ""))


@pytest.mark.parametrize("edges", ["exchange", "skip"])
def test_a_loss_sends_its_sums_and_a_window(given, edges):
    """The sums once, in one message; with exchange, one window from the neighbour. Nothing else."""
    trainer = trainer_of(8, edges)
    drawn = drawing(trainer)(jax.random.key(0), given[2])
    assert sorted(sent(loss_of(trainer, given), given[0], *drawn)) == sorted([SUMS, *windows(edges)])


@pytest.mark.slow
@pytest.mark.parametrize("edges", ["exchange", "skip"])
def test_gradients_send_these_back_and_their_own_sum(given, edges):
    trainer, params = trainer_of(8, edges), given[0]
    drawn = drawing(trainer)(jax.random.key(0), given[2])
    found = sent(jax.value_and_grad(loss_of(trainer, given)), params, *drawn)
    assert [one for one in found if one[0] != "all-reduce"] == windows(edges) * 2
    nbytes = sum(x.nbytes for x in jax.tree.leaves(params))
    assert nbytes <= sum(size for kind, size in found if kind == "all-reduce") <= nbytes + 2 * SUMS[1]


def test_edges_that_cannot_be_skipped():
    trainer = trainer_of(2, "skip", None)
    with pytest.raises(TrainingError, match="without a window"):
        skipped(trainer.drafter.module.config, trainer.groups, "skip")
    with pytest.raises(TrainingError, match="161 positions cannot be shared equally by 2"):
        trainer.groups.check(2, 161)


def test_packed_rows_are_not_cut(given):
    """On however many devices."""
    text = given[2]
    batch = {"ids": text.ids, "answer": text.answer, "positions": text.positions % 50}
    with pytest.raises(TrainingError, match=r"`positions` hold several documents, .* `cut_sequences`"):
        read(trainer_of(1), given[1], batch)
