"""The decode loop: golden runs, losslessness, cuts, rows of different lengths."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mimo_jax.backbone import Backbone, BackboneOutput
from mimo_jax.layers import array, rms_norm
from mimo_jax.model import Model
from mimo_jax.params import Declared
from mimo_jax.request import SamplingParams
from mimo_jax.speculative import ModelParams, Models, decode
from tests.conftest import golden_folders, golden_id
from tests.models import counting_model, decoded, golden_model, started, tiny_model

PROMPTS = [[5, 9, 2, 33, 7, 1, 12, 40, 8, 3, 21], [17], [4, 4, 50, 6, 28]]
GREEDY = [SamplingParams(max_new_tokens=24)] * 3


class PostNormBackbone(Backbone):
    """Captures the last layer after the final norm, as a loop around a Hugging Face model does."""

    def __call__(self, tokens, cache, capture=(), counts=None) -> BackboneOutput:
        output = super().__call__(tokens, cache, capture, counts)
        last = rms_norm(output.captured[:, :, -1], array(self.final_norm), self.config.rms_eps)
        return BackboneOutput(output.hidden, output.captured.at[:, :, -1].set(last), output.kv)


RUNS = [
    (folder, *key.split(".")[:3])
    for folder in golden_folders("dflash_*")
    for key in sorted(load_file(folder / "e2e_golden.safetensors"))
    if key.endswith(".tokens")
]


@pytest.mark.parametrize(
    ("folder", "name", "last", "prompt"), RUNS, ids=[f"{golden_id(r[0])}-{'-'.join(r[1:])}" for r in RUNS]
)
def test_golden_runs(folder, name, last, prompt):
    """Tokens and accepted lengths of every round; blocks and the backbone's picks too, where the prompt allows."""
    expected = load_file(folder / "e2e_golden.safetensors")
    window = golden_model(folder / "target").config.sliding_window
    model = golden_model(folder / "target", drafter=folder / f"drafter_{name}", swa_visible_keys=window)
    models = model.models if last == "prenorm" else _postnorm(model)
    run = {
        part: expected[f"{name}.{last}.{prompt}.{part}"]
        for part in ("prompt", "tokens", "accept_lengths", "blocks", "posterior")
    }
    prompts, wanted = [run["prompt"].ravel().tolist()], run["tokens"].ravel().tolist()
    settings = [SamplingParams(max_new_tokens=len(wanted))]
    # one chunk width for all runs: one compilation
    state, requests, first = started(models, model.params, prompts, settings, chunk=32)
    _, log = decode(models, model.params, state, requests, rounds=40, verify_length=8)
    log = jax.tree.map(lambda x: np.asarray(x)[: log.ran, 0], log)
    tokens = [int(first[0])] + [int(t) for row, n in zip(log.tokens, log.counts, strict=True) for t in row[:n]]
    assert tokens == wanted
    np.testing.assert_array_equal(log.accepted + 1, run["accept_lengths"].ravel())
    assert model.drafter_config is not None
    if model.drafter_config.mask_token_id not in prompts[0]:  # the reference loop overwrites that id's embedding
        np.testing.assert_array_equal(log.drafts, run["blocks"][:, 1:])
        np.testing.assert_array_equal(log.tokens, run["posterior"])


@cache
def _postnorm(model: Model) -> Models:
    config = model.config
    return Models(Declared(lambda: PostNormBackbone(config, "float32")), model.models.drafter)


@pytest.fixture(scope="module")
def plain():
    models, params = tiny_model(7)
    alone = Models(models.backbone), ModelParams(params.backbone)
    return decoded(*alone, PROMPTS, GREEDY, verify_length=1)[0]


@pytest.mark.parametrize("kind", ["random", "zero", "huge"])
def test_greedy_equals_plain_whatever_the_drafter(plain, kind):
    """Token for token in float32; rows of different lengths in one batch."""
    models, params = tiny_model(7)
    scale = {"random": 1.0, "zero": 0.0, "huge": 100.0}[kind]
    other = ModelParams(params.backbone, jax.tree.map(lambda w: scale * w, params.drafter))
    tokens, lengths = decoded(models, other, PROMPTS, GREEDY, verify_length=8)
    assert tokens == plain
    assert all(1 <= n <= 8 for row in lengths for n in row)


@pytest.mark.parametrize("verify_length", [1, 2, 5, 7])
def test_greedy_equals_plain_at_any_verify_length(plain, verify_length):
    models, params = tiny_model(7)
    tokens, lengths = decoded(models, params, PROMPTS, GREEDY, verify_length=verify_length)
    assert tokens == plain
    assert all(1 <= n <= verify_length for row in lengths for n in row)


def test_rows_of_a_batch_equal_rows_alone(plain):
    models, params = tiny_model(7)
    for prompt, tokens in zip(PROMPTS, plain, strict=True):
        assert decoded(models, params, [prompt], GREEDY[:1], verify_length=8)[0] == [tokens]


def test_chunked_prefill_gives_the_same_tokens(plain):
    models, params = tiny_model(7)
    assert decoded(models, params, PROMPTS, GREEDY, verify_length=8, chunk=4)[0] == plain


@pytest.mark.parametrize(("offset", "length"), [(0, 8), (3, 1)])
def test_accepted_length_of_perfect_and_of_wrong_drafters(offset, length):
    models, params = counting_model(32, offset)
    settings = [SamplingParams(max_new_tokens=41)] * 2
    tokens, lengths = decoded(models, params, [[3], [9, 10]], settings, verify_length=8)
    assert tokens == [[(4 + i) % 32 for i in range(41)], [(11 + i) % 32 for i in range(41)]]
    assert all(n == length for row in lengths for n in row)
    assert [len(row) for row in lengths] == [40 // length] * 2


@pytest.mark.parametrize("offset", [0, 3])
def test_nothing_is_emitted_after_a_stop_token(offset):
    """Wherever in an accepted block the stop token falls, the row ends with it; other rows go on."""
    models, params = counting_model(32, offset)
    settings = [SamplingParams(max_new_tokens=30, stop_token_ids=(s,)) for s in (6, 7, 13, 20, 31)] + [
        SamplingParams(max_new_tokens=30)
    ]
    tokens, _ = decoded(models, params, [[5]] * 6, settings, verify_length=8, eos=(25,))
    ends = [6, 7, 13, 20, 25, 25]
    assert tokens == [list(range(6, end + 1)) for end in ends]


def test_limits_are_exact_and_finished_rows_do_not_move():
    models, params = tiny_model(7)
    settings = [SamplingParams(max_new_tokens=n) for n in (1, 9, 24)]
    state, requests, _ = started(models, params, PROMPTS, settings)
    assert np.asarray(state.active).tolist() == [False, True, True]
    counts = np.ones(3, int)
    while bool(np.asarray(state.active).any()):
        before = np.asarray(state.cache.lengths)
        state, log = decode(models, params, state, requests, rounds=64, verify_length=8)
        counts += np.asarray(log.counts).sum(0)
        assert int(state.cache.lengths[0]) == before[0]
    assert counts.tolist() == [1, 9, 24]
    assert np.asarray(state.emitted).tolist() == [1, 9, 24]
    # committed: the prompt and every new token but the last, which is the anchor
    assert np.asarray(state.cache.lengths).tolist() == [
        len(p) + n - 1 for p, n in zip(PROMPTS, (1, 9, 24), strict=True)
    ]
    assert np.asarray(state.output_counts).sum(1).tolist() == [1, 9, 24]


SAMPLED = [
    SamplingParams(max_new_tokens=20, temperature=1.0, seed=3),
    SamplingParams(max_new_tokens=20, temperature=0.7, top_k=9, top_p=0.9, seed=4),
    SamplingParams(
        max_new_tokens=20, temperature=1.3, min_p=0.02, repetition_penalty=1.3, frequency_penalty=0.4, seed=5
    ),
]


def test_samples_do_not_depend_on_drafts_blocks_or_batch():
    """Keyed by (seed, position): the same tokens plain, speculative at any verify length, and alone."""
    models, params = tiny_model(7)
    alone = Models(models.backbone), ModelParams(params.backbone)
    expected, _ = decoded(*alone, PROMPTS, SAMPLED, verify_length=1)
    assert len({tuple(t) for t in expected}) == 3
    for verify_length in (2, 8):
        assert decoded(models, params, PROMPTS, SAMPLED, verify_length=verify_length)[0] == expected
    for prompt, setting, tokens in zip(PROMPTS, SAMPLED, expected, strict=True):
        assert decoded(models, params, [prompt], [setting], verify_length=8)[0] == [tokens]


@pytest.mark.slow
@pytest.mark.parametrize("sampled_drafts", [False, True])
def test_speculative_samples_follow_the_plain_law(sampled_drafts):
    """Chi-square of the second and third token against plain decoding of other seeds, penalties and top-p in play."""
    from scipy.stats import chi2_contingency

    models, params = tiny_model(7, vocab=8, block=4)
    rows, prompt = 2048, [1, 5, 2]

    def draw(first_seed: int, verify_length: int) -> np.ndarray:
        settings = [
            SamplingParams(
                max_new_tokens=4, temperature=0.9, top_p=0.95, top_k=6, presence_penalty=0.5, seed=first_seed + i
            )
            for i in range(rows)
        ]
        state, requests, first = started(models, params, [prompt] * rows, settings, capacity=64)
        tokens = [[int(t)] for t in first]
        while bool(np.asarray(state.active).any()):
            state, log = decode(
                models, params, state, requests, rounds=4, verify_length=verify_length,
                sampled_drafts=sampled_drafts and verify_length > 1,
            )  # fmt: skip
            for r in range(log.ran):
                for row in range(rows):
                    tokens[row] += np.asarray(log.tokens[r, row, : int(log.counts[r, row])]).tolist()
        return np.array(tokens)

    spec, plain = draw(0, 4), draw(1_000_000, 1)
    for columns in ((1,), (2,), (1, 2), (2, 3)):
        codes = [sum(t[:, c] * 8**i for i, c in enumerate(columns)) for t in (spec, plain)]
        table = np.array([np.bincount(c, minlength=8 ** len(columns)) for c in codes])
        table = table[:, table.sum(0) >= 10]
        p_value: Any = chi2_contingency(table)[1]
        assert p_value > 1e-4


def test_a_verify_length_above_one_needs_a_drafter():
    models, params = tiny_model(7)
    alone = Models(models.backbone), ModelParams(params.backbone)
    state, requests, _ = started(*alone, [[1]], GREEDY[:1])
    with pytest.raises(AssertionError, match="drafter"):
        decode(*alone, state, requests, rounds=1, verify_length=8)
