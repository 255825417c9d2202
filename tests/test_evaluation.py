"""Measuring models: acceptance beside predictability, paired comparisons, speed side by side."""

import json
from difflib import unified_diff

import numpy as np
import pytest

from mimo_jax.byte_tokenizer import SMALLEST_VOCABULARY
from mimo_jax.cli import main
from mimo_jax.evaluation import exact
from mimo_jax.evaluation.acceptance import measure
from mimo_jax.evaluation.exact import is_right, patched
from mimo_jax.evaluation.prompts import Prompt, load
from mimo_jax.evaluation.quality import Text, compare_exact, compare_perplexity, exact_answers, losses
from mimo_jax.evaluation.score import log_probabilities, score
from mimo_jax.evaluation.speed import compare_speed
from mimo_jax.request import SamplingParams
from mimo_jax.synthesize import synthesize
from tests.checkpoint_files import MICRO
from tests.models import counter

VOCAB = SMALLEST_VOCABULARY

BEST = (1 / VOCAB + 1e-5) ** -0.5
"""The logit of the best token, all others being 0: what the norm makes of a row of the identity."""


def loss_of_best() -> float:
    return float(np.log1p((VOCAB - 1) * np.exp(-BEST)))


@pytest.mark.parametrize(("offset", "length"), [(0, 8.0), (5, 1.0)])
def test_acceptance_counts_tokens_over_rounds(offset, length):
    found = measure(counter(offset), "chat", [[65], [33, 34], [70], [71]], SamplingParams(max_new_tokens=17), batch=2)
    assert (found.prompts, found.tokens, found.rounds) == (4, 64, 64 / length)
    assert found.accepted_length == length
    assert found.per_position == [float(length == 8)] * 7
    assert found.perplexity == pytest.approx(np.exp(loss_of_best()), rel=1e-5)
    p = np.exp(-loss_of_best())
    rest = (1 - p) / (VOCAB - 1)
    assert found.entropy == pytest.approx(-p * np.log(p) - (VOCAB - 1) * rest * np.log(rest), rel=1e-3)
    assert json.dumps(found.as_json())
    assert found.as_json()["release_card"] == 3.18


def test_log_probabilities_are_those_before_each_token():
    prompt, answer = [65, 66], [67, 68, 69]
    logits = log_probabilities(counter().model, prompt, answer)
    assert logits.argmax(-1).tolist() == answer
    whole = score(counter().model, np.array([[65, 66, 67, 68, 69]]))["logits"][0]
    np.testing.assert_allclose(logits - logits[:, :1], whole[1:4] - whole[1:4, :1], atol=1e-5)
    np.testing.assert_allclose(np.exp(logits).sum(-1), 1, rtol=1e-12)


def test_losses_are_of_the_answer_alone():
    right, wrong = Text([65], [66, 67]), Text([65, 66], [90])
    found = losses(counter(), [right, wrong])
    best = loss_of_best()
    np.testing.assert_allclose(found, [[2 * best, 2], [best + BEST, 1]], rtol=1e-4, atol=1e-6)


def test_perplexities_are_compared_in_pairs(rng):
    tokens = rng.integers(5, 50, 200)
    first = np.stack([tokens * rng.uniform(1, 3, 200), tokens], axis=1)
    same = compare_perplexity("x", first, first)
    assert (same.change, same.low, same.high) == (0, 0, 0)
    worse = first * [1.1, 1]
    found = compare_perplexity("x", first, worse)
    a, b = (np.exp(r[:, 0].sum() / tokens.sum()) for r in (first, worse))
    assert (found.first, found.second) == pytest.approx((a, b))
    assert found.change == pytest.approx(b / a - 1)
    # every document loses a tenth, so the interval is narrow although documents differ widely
    assert found.low < found.change < found.high < found.change + 0.05


def test_intervals_cover_as_often_as_they_say():
    """Of 200 pairs of equal checkpoints with independent noise, about 95 % of intervals hold zero."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        one, other = (rng.random((60, 1)) < 0.6 for _ in range(2))
        found = compare_exact("x", one.astype(float), other.astype(float))
        covered += found.low <= 0 <= found.high
    assert 0.88 < covered / 200 < 0.995


def prompt_of(content="?", answer=None, check=()):
    return Prompt("x-01", ({"role": "user", "content": content},), answer, check)


@pytest.mark.parametrize(
    ("text", "right"), [("Answer: 3 no, Answer: 12.", True), ("Answer: -12", False), ("12", False), ("", False)]
)
def test_the_last_number_is_the_answer(text, right):
    assert is_right(prompt_of(answer="12"), text) == right


@pytest.mark.parametrize("before", ["a\n", "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\nk\n"])
@pytest.mark.parametrize("after", ["a\nx\n", "b\nc\nd\ne\nf\ng\nh\ni\nj\n", "x\na\nb\ne\nf\ng\n\nh\ni\nj\nl\nk\n"])
def test_a_diff_is_applied(before, after):
    diff = "".join(unified_diff(before.splitlines(True), after.splitlines(True), "a/f", "b/f"))
    assert patched(before, diff) == after
    assert patched("other\n" + before, diff) is None
    prompt = prompt_of(f"Edit.\n\n```python\n{before}```", after)
    assert is_right(prompt, f"Here:\n```diff\n{diff}```")
    assert is_right(prompt, f"```python\n{after}```\nThat is all.")
    assert not is_right(prompt, f"```python\n{before}```")
    assert not is_right(prompt, after)


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("return x + 1", True),
        ("return x", False),
        ("raise SystemExit(0)", False),
        ("return", False),
        ("return (", False),
    ],
)
def test_a_function_is_run(body, right):
    prompt = prompt_of(check=(("f(1)", "2"), ("f(-1)", "0")))
    assert is_right(prompt, f"```python\ndef f(x):\n    {body}\n```") == right


def test_a_function_that_does_not_end_is_wrong(monkeypatch):
    monkeypatch.setattr(exact, "_SECONDS", 0.5)
    assert not is_right(prompt_of(check=(("f()", "1"),)), "```python\ndef f():\n    while True: pass\n```")
    with pytest.raises(ValueError, match="x-01"):
        is_right(prompt_of(), "")


def test_every_frozen_answer_is_right_and_every_request_alone_wrong():
    for prompt in (p for name in ("math", "edits") for p in load(name)):
        answered = f"Answer: {prompt.answer}" if "math" in prompt.id else f"```python\n{prompt.answer}```"
        assert is_right(prompt, answered)
        assert not is_right(prompt, prompt.messages[-1]["content"] + "\n")


def test_exact_answers_are_of_greedy_completions():
    """The counting model goes on with the code after the last one, and never gives an answer."""
    wanted = [prompt_of(answer="5"), prompt_of("again", answer="5")]
    assert exact_answers(counter(), wanted, max_new_tokens=8).tolist() == [[0.0], [0.0]]


def test_speed_is_compared_side_by_side():
    seen = []
    found = compare_speed(
        counter(), "chat", [[65], [70]], SamplingParams(max_new_tokens=17), runs=2, progress=seen.append
    )
    assert found.accepted_length == 8
    assert found.factor.runs == 2
    assert found.factor.low <= found.factor.median <= found.factor.high
    assert found.drafting_share > 0
    assert sum(seen) == 2 * 2 * 3
    assert json.dumps(found.as_json())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        synthesize(MICRO, root / str(seed), seed=seed)
    return root


@pytest.mark.slow
def test_commands_print_write_and_draw(folders, capsys, tmp_path):
    def run(*arguments) -> str:
        assert main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    few = ("--scenario", "math", "--scenario", "chat", "--prompts", 2, "--max-new-tokens", 9)
    files = ("--json", tmp_path / "a.json", "--picture", tmp_path / "a.png")
    shown = run("eval", "acceptance", "--model", folders / "0", *few, *files)
    results = json.loads((tmp_path / "a.json").read_text())["acceptance"]
    assert [(r["scenario"], r["temperature"]) for r in results] == [
        ("math", 0), ("chat", 0), ("math", 1), ("chat", 1),
    ]  # fmt: skip
    assert "accepted length" in shown
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    run("bench", "scenarios", "--model", folders / "0", *few, "--runs", 1, "--json", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["speed"][0]["factor"]["runs"] == 1
    both = ("--model", folders / "1", "--against", folders / "0", "--texts", 2)
    run("eval", "quality", *both, "--json", tmp_path / "q.json", "--picture", tmp_path / "q.svg")
    assert len(json.loads((tmp_path / "q.json").read_text())["quality"]) == 7
    assert "<svg" in (tmp_path / "q.svg").read_text()


def test_what_cannot_be_measured_is_said_first(folders, capsys, tmp_path):
    for arguments, said in (
        (("eval", "acceptance", "--model", folders / "0", "--drafter", "none"), "this model has n"),
        (("bench", "scenarios", "--model", folders / "0", "--drafter", "none"), "this model has n"),
        (("eval", "acceptance", "--model", folders / "0", "--json", tmp_path / "no" / "x.json"), "does not exist"),
        (("eval", "quality", "--model", folders / "0", "--against", tmp_path), "config.json"),
    ):
        assert main([str(a) for a in arguments]) == 2
        assert said in capsys.readouterr().err
