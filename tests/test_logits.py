"""Processing of logits against loops written the slow way: truncation, penalties along a block, keyed randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.request import SamplingParams, batch_requests
from mimo_jax.sampling import History, Purpose, process_logits, sample, truncate, uniforms

VOCAB = 37


def _sampling(settings, prompts=None):
    return jax.tree.map(jnp.asarray, batch_requests(prompts or [[0]] * len(settings), settings, (), VOCAB).sampling)


def _kept(logits: np.ndarray, p: SamplingParams) -> set[int]:
    """By sorting: top-k, then the fewest of those that hold top_p of their mass, then min-p; ties stay together."""
    x = logits / (p.temperature or 1.0)
    order = np.sort(x)[::-1]
    kept = x >= order[min(p.top_k or VOCAB, VOCAB) - 1]
    mass = np.where(kept, np.exp(x - x.max()), 0.0)
    if p.top_p < 1:
        ranked = np.sort(mass)[::-1]
        last = ranked[np.searchsorted(np.cumsum(ranked), p.top_p * mass.sum())]
        kept &= mass >= last
    return set(np.flatnonzero(kept & (mass >= p.min_p)).tolist())


def test_truncation_equals_sorting(rng):
    settings = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
        for t in (0.5, 1.0, 1.7)
        for k in (0, 1, 5, 100)
        for p in (1.0, 0.9, 0.3, 1e-6)
        for m in (0.0, 0.1)
    ]
    logits = (3 * rng.standard_normal((len(settings), 2, VOCAB))).astype(np.float32)
    got = np.asarray(truncate(jnp.asarray(logits), _sampling(settings)))
    for row, p in enumerate(settings):
        for i in range(2):
            assert set(np.flatnonzero(np.isfinite(got[row, i]))) == _kept(logits[row, i].astype(np.float64), p), p


def test_ties_with_the_last_one_kept_are_kept():
    logits = jnp.asarray(np.array([3.0, 2.0, 2.0, 1.0] + [-50.0] * (VOCAB - 4), np.float32))[None, None]
    got = truncate(logits, _sampling([SamplingParams(temperature=1.0, top_k=2)]))
    assert np.flatnonzero(np.isfinite(np.asarray(got)[0, 0])).tolist() == [0, 1, 2]


def test_penalties_follow_the_block_row_by_row(rng):
    prompts = [[1, 2, 3], [4, 4, 9], [30]]
    settings = [
        SamplingParams(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2),
        SamplingParams(frequency_penalty=-0.5, logit_bias={7: 2.0, 9: -1.0}),
        SamplingParams(repetition_penalty=0.8, presence_penalty=-0.4),
    ]
    logits = rng.standard_normal((3, 4, VOCAB)).astype(np.float32)
    block = np.array([[5, 6, 6, 1], [9, 9, 9, 9], [30, 2, 8, 2]])
    outputs = [[5, 11, 5], [9, 4], [12, 30]]  # the block's first token is the last one emitted
    counts = np.array([np.bincount(o, minlength=VOCAB) for o in outputs])
    history = History(jnp.asarray(counts, jnp.int32), jnp.asarray(block, jnp.int32))
    got = process_logits(jnp.asarray(logits), _sampling(settings, prompts), history)
    expected = logits.astype(np.float64).copy()
    for b, p in enumerate(settings):
        for i in range(4):
            past = outputs[b] + block[b, 1 : i + 1].tolist()
            for t in range(VOCAB):
                x = expected[b, i, t]
                if t in past or t in prompts[b]:
                    x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
                x -= p.frequency_penalty * past.count(t) + p.presence_penalty * (t in past)
                expected[b, i, t] = x + p.logit_bias.get(t, 0.0)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_random_numbers_are_keyed_by_seed_position_and_purpose():
    seeds, positions = jnp.array([3, 4, 3], jnp.uint32), jnp.array([[7, 8], [7, 8], [8, 9]])
    a = np.asarray(uniforms(seeds, positions, Purpose.ACCEPT))
    assert a[0, 1] == a[2, 0]
    assert len(np.unique(a)) == 5
    assert not np.intersect1d(a, np.asarray(uniforms(seeds, positions, Purpose.RESIDUAL))).size


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}])
def test_samples_follow_the_truncated_softmax(rng, settings):
    from scipy.stats import chisquare

    n = 20_000
    logits = np.broadcast_to(rng.standard_normal(VOCAB).astype(np.float32), (1, n, VOCAB))
    sampling = _sampling([SamplingParams(seed=5, **settings)])
    truncated = truncate(jnp.asarray(logits), sampling)
    drawn = np.asarray(sample(truncated, sampling, jnp.arange(n)[None], Purpose.TOKEN))[0]
    x = np.asarray(truncated)[0, 0].astype(np.float64)
    law = np.exp(x - x.max())
    law /= law.sum()
    observed = np.bincount(drawn, minlength=VOCAB)
    assert (law > 0).sum() > 2
    assert (observed[law == 0] == 0).all()
    often = law * n >= 5
    rest = [observed[~often].sum()] if (~often & (law > 0)).any() else []
    expected = [*(law[often] * n), *([law[~often].sum() * n] if rest else [])]
    p_value = chisquare([*observed[often], *rest], expected)[1]
    assert p_value > 1e-4


def test_greedy_ties_go_to_the_lowest_id():
    logits = jnp.zeros((1, 3, VOCAB))
    assert sample(logits, _sampling([SamplingParams()]), jnp.zeros((1, 3), jnp.int32), Purpose.TOKEN).tolist() == [
        [0] * 3
    ]
