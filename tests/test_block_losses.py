"""Losses of a drafter's blocks, and their gradients, against their definitions in float64 NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.training.block_losses import score_blocks
from mimo_jax.training.groups import Groups
from sharding.collectives import Cut
from sharding.topology import Topology

VOCAB, HIDDEN, SEEN = 13, 6, 5


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference(loss, gamma, logits, labels, labelled, teacher_logits):
    """Sum of losses, what divides it, and the sum's gradient by the logits [blocks, rows, vocab], row by row."""
    log_q, p = log_softmax(logits), np.exp(log_softmax(teacher_logits))
    total, divisor, gradient = 0.0, 0.0, np.zeros_like(logits)
    for n in range(labels.shape[0]):
        stands = 1.0
        accepted = []
        for r in range(labels.shape[1]):
            stands *= 0.5 * np.exp(log_q[n, r, labels[n, r]]) + 0.5 if labelled[n, r] else 0.0
            accepted.append(stands)
        if loss == "d-pace":
            divisor += labelled[n].any()
        for r in range(labels.shape[1]):
            if not labelled[n, r]:
                continue
            wanted = p[n, r] if loss == "kd" else np.eye(VOCAB)[labels[n, r]]
            weight = sum(accepted[r:]) if loss == "d-pace" else np.exp(-r / gamma)
            divisor += weight if loss != "d-pace" else 0.0
            total -= weight * wanted @ log_q[n, r]
            gradient[n, r] = weight * (np.exp(log_q[n, r]) - wanted)
    return total, divisor, gradient


@pytest.mark.parametrize("loss", ["hard", "kd", "d-pace"])
@pytest.mark.parametrize(("blocks", "rows", "gamma"), [(5, 7, 7.0), (9, 3, 2.0)])
def test_equals_its_definition(rng, loss, blocks, rows, gamma):
    hidden, seen = rng.normal(size=(blocks, rows, HIDDEN)), rng.normal(size=(blocks, rows, SEEN))
    head, teacher = rng.normal(size=(HIDDEN, VOCAB)), rng.normal(size=(SEEN, VOCAB))
    labels = rng.integers(0, VOCAB, (blocks, rows))
    labelled = np.arange(rows) < rng.integers(1, rows + 1, (blocks, 1))
    labelled[0], labelled[1] = False, True  # a block without labels, one with all
    labelled[2] = [True, False, *[True] * (rows - 2)]
    total, divisor, by_logits = reference(loss, gamma, hidden @ head, labels, labelled, seen @ teacher)

    head, teacher, hidden, seen = (jnp.asarray(x, jnp.float32) for x in (head, teacher, hidden, seen))

    def scored(hidden, teacher):
        given = jnp.asarray(labels, jnp.int32), jnp.asarray(labelled)
        scores = score_blocks(loss, gamma, lambda x: x @ head, hidden, *given, lambda x: x @ teacher, seen)
        return scores.loss, scores

    by_hidden, by_teacher = jax.jit(jax.grad(lambda *x: scored(*x)[0], argnums=(0, 1)))(hidden, teacher)
    _, scores = scored(hidden, teacher)
    np.testing.assert_allclose(scores.loss, total, rtol=1e-5)
    np.testing.assert_allclose(scores.total, divisor, rtol=1e-6)
    best = np.argmax(np.asarray(hidden @ head), -1)
    np.testing.assert_array_equal(scores.correct, (best == labels) & labelled)
    np.testing.assert_allclose(by_hidden, by_logits @ np.asarray(head, np.float64).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(by_teacher, 0)  # the backbone is not trained


@pytest.mark.parametrize("loss", ["hard", "kd", "d-pace"])
def test_a_vocabulary_that_is_cut_changes_nothing(rng, loss):
    """Loss, what is right, and gradients, where each of four devices has a part of both heads."""
    hidden, seen = rng.normal(size=(5, 7, HIDDEN)), rng.normal(size=(5, 7, SEEN))
    head, teacher = rng.normal(size=(HIDDEN, 16)), rng.normal(size=(SEEN, 16))
    labels, labelled = rng.integers(0, 16, (5, 7)), rng.random((5, 7)) < 0.8
    hidden, seen, head, teacher = (jnp.asarray(x, jnp.float32) for x in (hidden, seen, head, teacher))

    def scored(vocabulary, hidden, head, teacher):
        given = jnp.asarray(labels, jnp.int32), jnp.asarray(labelled)
        heads = partial(jnp.matmul, b=head), partial(jnp.matmul, b=teacher)
        scores = score_blocks(loss, 7.0, heads[0], hidden, *given, heads[1], seen, vocabulary)
        return scores.loss / scores.total, scores.correct

    topology, part = Topology(4), jax.P(None, "tensor")
    here = Groups(topology, topology.mesh()).on_all
    cut = here(partial(scored, topology.cut("logits")), (jax.P(), part, part), jax.P())
    expected, got = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, head, teacher)
        for f in (partial(scored, Cut()), cut)
    )
    assert np.any(expected[0][1])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, expected)


def test_the_backbones_own_distribution_is_the_best_to_follow(rng):
    """Distillation is least, and level, where the drafter's distribution is the teacher's."""
    logits = jnp.asarray(rng.normal(size=(1, 7, VOCAB)), jnp.float32)
    ones, none = jnp.ones((1, 7), bool), jnp.zeros((1, 7), jnp.int32)

    def loss(x):
        return score_blocks("kd", 7.0, lambda x: x, x, none, ones, lambda x: x, logits).loss

    np.testing.assert_allclose(jax.grad(loss)(logits), 0, atol=1e-6)
    assert loss(logits + jnp.asarray(rng.normal(size=logits.shape), jnp.float32)) > loss(logits)
