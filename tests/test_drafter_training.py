"""Training a drafter: its blocks are those of decoding, its labels are not shifted, and it learns."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.cache import backbone_cache
from mimo_jax.drafter import Drafter
from mimo_jax.evaluation.score import score_draft
from mimo_jax.generate import Generator
from mimo_jax.model import Model
from mimo_jax.params import Declared
from mimo_jax.request import SamplingParams
from mimo_jax.speculative import ModelParams, Models
from mimo_jax.training import TrainingError
from mimo_jax.training.anchors import candidates, draw_anchors
from mimo_jax.training.answers import Answers, read_answers
from mimo_jax.training.drafter_training import DrafterTrainer, Text, block_loss, drafter_step
from mimo_jax.training.groups import Groups
from mimo_jax.training.initialization import initial_params
from mimo_jax.training.optimizers import OptimizerConfig, make_optimizer
from mimo_jax.training.regeneration import regenerate
from tests.models import decoded, tiny_configs, tiny_model

LENGTH = 40


@pytest.fixture(scope="module", params=[10, None, 3], ids=["window 10", "no window", "window 3"])
def case(request):
    """Models, two sequences, their features, and the block logits of decoding at some anchors."""
    models, params = tiny_model(3, drafter_window=request.param)
    config, drafter_config = models.backbone.module.config, tiny_configs(drafter_window=request.param)[1]
    model = Model(models, params, "float32", None)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 61, (2, LENGTH)).astype(np.int32)
    backbone = models.backbone.bind(params.backbone)
    cache = backbone_cache(config, 2, 0, 1, "float32")
    seen = backbone(jnp.asarray(ids), cache, drafter_config.target_layer_ids)
    anchors = np.array([[0, 1, 7, 20, 33, 39], [2, 9, 10, 11, 31, 36]], np.int32)
    flat = np.asarray(seen.captured).reshape(2, LENGTH, -1)
    logits = np.stack(
        [
            score_draft(model, flat, ids[np.arange(2), anchors[:, n]], anchors[:, n])["logits"]
            for n in range(anchors.shape[1])
        ],
        axis=1,
    )  # [batch, blocks, block, vocab]
    return models, params, ids, seen, anchors, logits, np.asarray(backbone.logits(seen.hidden))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def losses(loss, logits, teacher, ids, answer, anchors, drawn, gamma):
    """The loss as its definition has it, block by block and row by row."""
    log_q, p = log_softmax(logits), np.exp(log_softmax(teacher))
    total = divisor = 0.0
    for b, n in np.ndindex(anchors.shape):
        labelled = [drawn[b, n] and at < LENGTH and answer[b, at] for at in range(anchors[b, n], anchors[b, n] + 8)]
        own = [ids[b, min(anchors[b, n] + r, LENGTH - 1)] for r in range(8)]
        stands = [0.5 * np.exp(log_q[b, n, r, own[r]]) + 0.5 if labelled[r] else 0.0 for r in range(1, 8)]
        gains = [np.cumprod(stands)[r - 1 :].sum() for r in range(1, 8)]
        divisor += any(labelled[1:]) if loss == "d-pace" else 0.0
        for r in range(1, 8):
            if labelled[r]:
                w = gains[r - 1] if loss == "d-pace" else np.exp(-(r - 1) / gamma)
                # the backbone's distribution at the position before is that of the row's token
                wanted = p[b, anchors[b, n] + r - 1] if loss == "kd" else np.eye(61)[own[r]]
                total -= w * wanted @ log_q[b, n, r]
                divisor += w if loss != "d-pace" else 0.0
    return total / divisor


@pytest.mark.parametrize(("loss", "gamma", "at_once"), [("hard", 4.0, 5), ("kd", 7.0, 128), ("d-pace", 7.0, 5)])
def test_the_loss_is_that_of_the_blocks_that_decoding_fills(case, rng, loss, gamma, at_once):
    """Labels at the rows' own positions, context strictly before the anchor, one global normalisation."""
    models, params, ids, seen, anchors, logits, teacher = case
    answer, drawn = rng.random((2, LENGTH)) < 0.7, rng.random(anchors.shape) < 0.8
    optimizer = make_optimizer(models.drafter.axes, OptimizerConfig(), 10)
    trainer = DrafterTrainer(models.backbone, models.drafter, optimizer, loss=loss, gamma=gamma, blocks_at_once=at_once)
    backbone = models.backbone.bind(params.backbone)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    text = Text(jnp.asarray(ids), jnp.asarray(answer), jnp.asarray(positions), seen.captured, seen.hidden)
    value, metrics = block_loss(trainer, backbone, params.drafter, text, jnp.asarray(anchors), jnp.asarray(drawn))
    expected = losses(loss, logits, teacher, ids, answer, anchors, drawn, gamma)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    best = logits.argmax(-1)
    right = [
        [best[b, n, r] == ids[b, anchors[b, n] + r] and answer[b, anchors[b, n] + r] for r in range(1, 8)]
        if anchors[b, n] + 7 < LENGTH
        else [
            anchors[b, n] + r < LENGTH and best[b, n, r] == ids[b, anchors[b, n] + r] and answer[b, anchors[b, n] + r]
            for r in range(1, 8)
        ]
        for b, n in np.ndindex(anchors.shape)
        if drawn[b, n]
    ]
    assert float(metrics["accepted_length"]) == pytest.approx(1 + np.cumprod(right, 1).sum() / drawn.sum(), rel=1e-5)


def test_anchors_are_uniform_without_replacement():
    answer = np.zeros((3, 30), bool)
    answer[0, 5:20] = True
    answer[1, [3, 4, 9, 20, 21]] = True
    positions = jnp.broadcast_to(jnp.arange(30, dtype=jnp.int32), answer.shape)
    candidate = candidates("random", 8, jnp.asarray(answer), positions)
    draw = jax.jit(lambda key: draw_anchors(key, candidate, 6, Groups()))
    possible = [set(range(5, 19)), {3, 20}, set()]
    counts = np.zeros(30)
    for i in range(400):
        anchors, drawn = map(np.asarray, draw(jax.random.key(i)))
        assert drawn.sum(1).tolist() == [6, 2, 0]
        for row in range(3):
            chosen = anchors[row][drawn[row]].tolist()
            assert len(set(chosen)) == len(chosen)
            assert set(chosen) <= possible[row]
        counts[anchors[0]] += 1
    expected = 400 * 6 / 14
    assert ((counts[5:19] - expected) ** 2 / expected).sum() < 40  # 14 cells; without replacement it is less


@pytest.mark.slow
def test_a_drafter_learns_its_backbones_answers(tmp_path):
    """Self-generated data: the accepted length of real decoding rises above 4. A shift of one would hold it near 1."""
    models, params = tiny_model(7)
    assert models.drafter is not None
    model = Model(Models(models.backbone), params, "float32", None)
    prompts = [[int(x) for x in row] for row in np.random.default_rng(0).integers(0, 61, (24, 4))]
    asked = SamplingParams(max_new_tokens=44, ignore_eos=True)
    regenerate(Generator(model), prompts, asked, tmp_path / "answers.jsonl", batch=24)
    answers = Answers.read(tmp_path / "answers.jsonl", 61)
    steps = 250
    optimizer = make_optimizer(models.drafter.axes, OptimizerConfig(learning_rate=1e-2, warmup=10), steps)
    trainer = DrafterTrainer(models.backbone, models.drafter, optimizer, anchors=128)
    state = trainer.start(initial_params(models.drafter, 2, seed=0))
    before = jax.tree.map(np.asarray, params.backbone)
    for step in range(steps):
        batch = answers.batch(step, 8, 64, seed=0)
        state, _ = drafter_step(trainer, state, batch, params.backbone, jax.random.key(step))
    jax.tree.map(np.testing.assert_array_equal, before, params.backbone)  # frozen
    learnt = ModelParams(params.backbone, state.params)
    _, lengths = decoded(models, learnt, prompts[:8], [replace(asked, max_new_tokens=40)] * 8, verify_length=8)
    assert sum(map(sum, lengths)) / sum(map(len, lengths)) > 4


def test_regeneration_goes_on_where_it_was(tmp_path):
    models, params = tiny_model(7)
    model = Model(Models(models.backbone), params, "float32", None)
    generator, out = Generator(model), tmp_path / "answers.jsonl"
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 2, 1]]
    sampled = SamplingParams(max_new_tokens=6, temperature=1.0, seed=4, ignore_eos=True)
    regenerate(generator, prompts, sampled, out, batch=2)
    whole = list(read_answers(out))
    assert [p for p, _ in whole] == prompts
    expected = [generator.generate(p, replace(sampled, seed=4 + i)).token_ids for i, p in enumerate(prompts)]
    assert [a for _, a in whole] == expected
    lines = out.read_text().splitlines()
    out.write_text(lines[0] + "\n" + lines[1] + "\n")
    regenerate(generator, prompts, sampled, out, batch=2)
    assert list(read_answers(out)) == whole
    with pytest.raises(TrainingError, match="answers to other prompts"):
        regenerate(generator, prompts[::-1], sampled, out)


def test_answers_in_rows(tmp_path):
    """Whole answers from their prompts on, several a row; every epoch has all."""
    out = tmp_path / "answers.jsonl"
    pairs = [([n] * (1 + n), [n] * 9) for n in range(1, 60)] + [([60] * 3, [60] * 300)]
    out.write_text("".join(json.dumps({"prompt_ids": p, "answer_ids": a}) + "\n" for p, a in pairs))
    answers = Answers.read(out, 61)
    steps = -(-sum(min(128, len(p) + len(a)) for p, a in pairs) // 256)  # so well do these fill their rows
    seen = [set(), set()]
    for step in range(2 * steps):
        batch = answers.batch(step, 2, 128, seed=3)
        assert {x.shape for x in batch.values()} == {(2, 128), (2,)}
        for ids, answer, positions, length in zip(*batch.values(), strict=True):
            at = 0
            while at < length:
                n = ids[at]
                prompt, answered = pairs[n - 1]
                whole = (prompt + answered)[:128]
                here = slice(at, at + len(whole))
                assert ids[here].tolist() == whole
                assert answer[here].tolist() == [i >= len(prompt) for i in range(len(whole))]
                assert positions[here].tolist() == list(range(len(whole)))
                seen[step // steps].add(int(n))
                at += len(whole)
            assert at == length
            assert not ids[at:].any()
            assert not answer[at:].any()
            assert not positions[at:].any()
    assert seen == [set(range(1, 61))] * 2
    assert answers.batch(0, 2, 128, seed=3)["ids"].tolist() != answers.batch(steps, 2, 128, seed=3)["ids"].tolist()
    apart = [answers.batch(step, 4, 128, seed=3, alone=True) for step in range(15)]
    assert {row[0] for batch in apart for row in batch["ids"].tolist()} == set(range(1, 61))
    assert all({n for n in row if n} == {row[0]} for batch in apart for row in batch["ids"].tolist())
    assert all(batch.keys() == {"ids", "answer", "lengths"} for batch in apart)
    again = answers.batch(5, 2, 128, seed=3)
    np.testing.assert_array_equal(again["ids"], Answers.read(out, 61).batch(5, 2, 128, seed=3)["ids"])


def test_damaged_answers_are_refused(tmp_path):
    out = tmp_path / "answers.jsonl"
    for text, error in [
        (json.dumps({"prompt_ids": [1]}) + "\n", r"answers\.jsonl:1"),
        ("", "no answers"),
        (json.dumps({"prompt_ids": [1], "answer_ids": [61]}) + "\n", "token 61"),
    ]:
        out.write_text(text)
        with pytest.raises(TrainingError, match=error):
            Answers.read(out, 61)


def test_a_five_layer_drafter_needs_no_context_at_all(rng):
    """Anchors at position 0 see nothing: the loss is finite, and so are its gradients."""
    models, params = tiny_model(3)
    _, config = tiny_configs()
    deep = Declared(lambda: Drafter(replace(config, num_layers=5), "float32"))
    optimizer = make_optimizer(deep.axes, OptimizerConfig(), 10)
    trainer = DrafterTrainer(models.backbone, deep, optimizer, anchors=8)
    state = trainer.start(initial_params(deep, 5, seed=0))
    answer = np.zeros((2, 9), bool)
    answer[0, :2] = True  # one candidate in one row, at its beginning
    ids = rng.integers(0, 61, (2, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    batch = {"ids": ids, "answer": answer, "positions": positions, "lengths": np.full(2, 9, np.int32)}
    state, metrics = drafter_step(trainer, state, batch, params.backbone, jax.random.key(0))
    assert np.isfinite(float(metrics["loss"]))
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state.params))
