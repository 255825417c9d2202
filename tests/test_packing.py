"""Several documents in a row: each gets what it gets alone, from attention to the gradient of the loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.cache import Documents, backbone_cache
from mimo_jax.training.anchors import candidates
from mimo_jax.training.drafter_training import DrafterTrainer, Text, block_loss
from mimo_jax.training.optimizers import OptimizerConfig, make_optimizer
from mimo_jax.training.packing import pack
from pallas_kernels.packed_attention import packed_attention
from tests.models import tiny_model

SIZES = ((13, 1, 20), (9, 25))
"""Documents of two rows; the second row is longer than its documents, and so than a tile of rows is the first."""
LENGTH = 35


def positions_of(sizes, length=LENGTH):
    found = np.zeros((len(sizes), length), np.int32)
    for row, of_row in enumerate(sizes):
        found[row, : sum(of_row)] = np.concatenate([np.arange(n) for n in of_row])
    return found


@pytest.mark.parametrize("visible_keys", [None, 6])
@pytest.mark.parametrize("with_sink", [True, False])
def test_attention_equals_its_definition(rng, visible_keys, with_sink):
    q, k, v = rng.normal(size=(2, LENGTH, 4, 6)), rng.normal(size=(2, LENGTH, 2, 6)), rng.normal(size=(2, LENGTH, 2, 5))
    sink = rng.normal(size=4) if with_sink else None
    positions = positions_of(SIZES)
    expected = np.zeros((2, LENGTH, 4, 5))
    for b, t, h in np.ndindex(2, LENGTH, 4):
        seen = [s for s in range(t - positions[b, t], t + 1) if visible_keys is None or t - s < visible_keys]
        weights = np.exp([q[b, t, h] @ k[b, s, h // 2] * 6**-0.5 for s in seen])
        total = weights.sum() + (0 if sink is None else np.exp(sink[h]))
        expected[b, t, h] = weights @ v[b, seen, h // 2] / total
    given = [None if x is None else jnp.asarray(x, jnp.float32) for x in (q, k, v, sink)]
    got = jax.jit(packed_attention, static_argnames="visible_keys")(
        *given[:3], positions=jnp.asarray(positions), visible_keys=visible_keys, sink=given[3]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=[10, pytest.param(None, marks=pytest.mark.slow)], ids=["window 10", "no window"])
def both_ways(request):
    """Two documents in a row and each by itself, from the same backbone: (trainer, params, packed, alone)."""
    models, params = tiny_model(3, drafter_window=request.param)
    assert models.drafter is not None
    optimizer = make_optimizer(models.drafter.axes, OptimizerConfig(), 10)
    trainer = DrafterTrainer(models.backbone, models.drafter, optimizer, loss="kd", blocks_at_once=8)
    backbone, capture = models.backbone.bind(params.backbone), models.drafter.module.config.target_layer_ids
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, 61, (2, LENGTH)), jnp.int32)
    positions = jnp.asarray(positions_of(SIZES))
    packed = ids, positions, jax.jit(lambda: backbone(ids, Documents(positions), capture))()
    longest = max(map(max, SIZES))
    cut = [(row, sum(SIZES[row][:n]), size) for row in range(2) for n, size in enumerate(SIZES[row])]
    apart = jnp.stack([jnp.pad(ids[r, s : s + n], (0, longest - n)) for r, s, n in cut])
    cache = backbone_cache(backbone.config, len(cut), 0, 1, "float32")
    alone = apart, cut, jax.jit(lambda: backbone(apart, cache, capture))()  # as prompts are computed in serving
    return trainer, params, packed, alone


def test_the_backbone_sees_documents_apart(both_ways):
    _, _, (_, _, packed), (_, cut, alone) = both_ways
    for document, (row, start, size) in enumerate(cut):
        for name in ("hidden", "captured"):
            got, expected = getattr(packed, name)[row, start : start + size], getattr(alone, name)[document, :size]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "gradients", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["loss", "loss and gradients"]
)
def test_blocks_are_those_of_documents_apart(both_ways, gradients):
    """The same anchors, in one row or in several; among them the ends of documents, whose labels must not go on."""
    trainer, params, (ids, positions, packed), (apart, cut, alone) = both_ways
    backbone = trainer.backbone.bind(params.backbone)
    inside = [[0, 5, 11], [0], [0, 1, 12, 17], [3, 7], [0, 9, 23]]  # anchors of each document

    def of(seen, ids, positions, answer, places):
        """The loss, metrics and gradients, given the row of each document and where it begins there."""
        anchors, drawn = np.zeros((len(ids), 8), np.int32), np.zeros((len(ids), 8), bool)
        for chosen, (row, start) in zip(inside, places, strict=True):
            for anchor in chosen:
                at = drawn[row].sum()
                anchors[row, at], drawn[row, at] = start + anchor, True
        text = Text(ids, answer, positions, seen.captured, seen.hidden)

        def loss(params):
            return block_loss(trainer, backbone, params, text, jnp.asarray(anchors), jnp.asarray(drawn))

        return jax.jit(jax.value_and_grad(loss, has_aux=True) if gradients else loss)(params.drafter)

    found = of(packed, ids, positions, positions > -1, [place[:2] for place in cut])
    apart_positions = jnp.broadcast_to(jnp.arange(apart.shape[1], dtype=jnp.int32), apart.shape)
    apart_answer = apart_positions < jnp.asarray([[n] for _, _, n in cut])
    expected = of(alone, apart, apart_positions, apart_answer, [(document, 0) for document in range(len(cut))])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, expected)


def test_anchors_have_a_label_in_their_own_document():
    positions = positions_of(((4, 3, 6), (13,)), 14)
    answer = np.zeros((2, 14), bool)
    answer[0, [2, 3, 4, 5, 6, 9, 10, 11, 12]] = True  # the second document has no prompt
    answer[1, 4:13] = True
    find = lambda choice: candidates(choice, 3, jnp.asarray(answer), jnp.asarray(positions))
    assert [np.flatnonzero(row).tolist() for row in find("random")] == [[2, 4, 5, 9, 10, 11], list(range(4, 12))]
    assert [np.flatnonzero(row).tolist() for row in find("fixed")] == [[2, 4, 9], [4, 7, 10]]


def test_rows_are_full(rng):
    """Every document once, no row too long, and hardly any room left where there is a choice."""
    sizes = rng.integers(1, 200, 500).tolist()
    rows = pack(sizes, 256)
    assert sorted(n for row in rows for n in row) == list(range(500))
    filled = [sum(sizes[n] for n in row) for row in rows]
    assert max(filled) <= 256
    assert sum(filled) > 0.97 * 256 * len(rows)
    assert pack([7, 7, 7], 7) == [[0], [1], [2]]
    assert pack([], 7) == []
