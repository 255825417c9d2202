"""`Generator`: text, streams and statistics, on a model whose every answer is known and on a random one."""

from functools import cache

import jax
import numpy as np
import pytest

from mimo_jax import Completion, Decoding, Generator, SamplingParams, Session
from mimo_jax.byte_tokenizer import SMALLEST_VOCABULARY
from mimo_jax.speculative import draft, verify
from mimo_jax.stats import DecodeStats
from tests.models import byte_generator, counter, tiny_model

ALPHABET = "".join(map(chr, range(ord("B"), ord("{"))))
"""How the counting model goes on after A."""


@cache
def random_generator() -> Generator:
    return byte_generator(*tiny_model(7, vocab=SMALLEST_VOCABULARY))


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("start", range(11))
def test_a_stop_string_cuts_wherever_it_falls_in_a_block(offset, start):
    """Inside a round's block, across two rounds, across two dispatches; nothing after it is emitted."""
    stop = ALPHABET[start : start + 3]
    completion = counter(offset).generate("A", max_new_tokens=40, stop=(stop, "never"), decoding=Decoding(None, 1))
    assert completion.text == ALPHABET[:start]
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) == start + 3
    assert completion.stats.new_tokens == start + 3
    assert sum(r.emitted for r in completion.rounds) == start + 2


def test_a_stop_string_of_one_row_leaves_the_others_alone():
    params = [SamplingParams(max_new_tokens=30, stop=stop) for stop in (("DE",), (), ("YZ", "LM"))]
    completions = counter().generate_batch(["A"] * 3, params, decoding=Decoding(rounds_per_dispatch=1))
    assert [c.text for c in completions] == ["BC", ALPHABET[:30], "BCDEFGHIJK"]
    assert [c.finish_reason for c in completions] == ["stop", "length", "stop"]


def test_the_beginning_of_a_stop_string_at_the_end_is_text():
    completion = counter().generate("A", max_new_tokens=6, stop=("FGH",))
    assert (completion.text, completion.finish_reason) == (ALPHABET[:6], "length")


@pytest.mark.parametrize("offset", [0, 5])
def test_stop_ids_and_end_of_text(offset):
    generator = counter(offset)
    stopped = generator.generate("A", max_new_tokens=40, stop_token_ids=(ord("K"),))
    assert (stopped.text, stopped.finish_reason) == (ALPHABET[:10], "stop")
    (eos,) = generator.model.eos_ids
    before = [eos - 3]
    ended = generator.generate(before, max_new_tokens=10)
    assert (ended.token_ids, ended.finish_reason) == ([eos - 2, eos - 1, eos], "stop")
    going = generator.generate(before, max_new_tokens=6, ignore_eos=True)
    assert (going.token_ids, going.finish_reason) == ([(eos - 2 + i) % SMALLEST_VOCABULARY for i in range(6)], "length")
    # a stop id is honoured on the very last token allowed, and on the first
    assert generator.generate("A", max_new_tokens=3, stop_token_ids=(ord("D"),)).finish_reason == "stop"
    first = generator.generate("A", max_new_tokens=3, stop_token_ids=(ord("B"),))
    assert (first.text, first.stats.rounds, first.stats.accepted_length) == ("B", 0, 0.0)


def test_statistics_count_what_was_emitted():
    right = counter(0).generate("A", max_new_tokens=41).stats
    assert (right.prompt_tokens, right.new_tokens, right.round_tokens, right.rounds) == (1, 41, 40, 5)
    assert right.accepted_length == 8
    assert right.acceptance == [1.0] * 7
    wrong = counter(5).generate("A", max_new_tokens=41).stats
    assert (wrong.round_tokens, wrong.rounds, wrong.accepted_length, wrong.acceptance) == (40, 40, 1.0, [0.0] * 7)
    plain = counter(0).generate("A", max_new_tokens=41, decoding=Decoding(verify_length=1)).stats
    assert (plain.rounds, plain.accepted_length, plain.acceptance) == (40, 1.0, [])
    total = sum((right, wrong, plain), DecodeStats())
    assert (total.new_tokens, total.rounds, total.accepted_length) == (123, 85, 120 / 85)
    np.testing.assert_allclose(total.acceptance, [5 / 85] * 7)
    # the last round is cut at the limit: it accepts eight and emits what is left
    cut = counter(0).generate("A", max_new_tokens=12).stats
    assert (cut.round_tokens, cut.rounds, cut.accepted_length, cut.acceptance) == (11, 2, 5.5, [1.0] * 7)


SETTINGS = [
    SamplingParams(max_new_tokens=20, ignore_eos=True),
    SamplingParams(max_new_tokens=33, temperature=1.0, seed=1, ignore_eos=True),
    SamplingParams(max_new_tokens=27, temperature=0.8, top_p=0.9, frequency_penalty=0.3, seed=2, ignore_eos=True),
]
PROMPTS = ["Once", "The quick brown fox jumps over", [1, 2, 3]]


def test_streams_and_batches_give_the_same_text():
    """Random bytes, so characters are cut anywhere: pieces joined are the whole, batched or one by one."""
    generator = random_generator()
    together = generator.generate_batch(PROMPTS, SETTINGS)
    for prompt, params, completion in zip(PROMPTS, SETTINGS, together, strict=True):
        assert len(completion.token_ids) == params.max_new_tokens
        assert completion.text == generator.tokenizer.decode(completion.token_ids)
        assert "".join(generator.stream(prompt, params)) == completion.text
    for decoding in (Decoding(verify_length=1), Decoding(verify_length=3, rounds_per_dispatch=1)):
        again = generator.generate_batch(PROMPTS, SETTINGS, decoding=decoding)
        assert again != together  # other rounds
        assert [c.token_ids for c in again] == [c.token_ids for c in together]
    sampled = generator.generate(PROMPTS[1], SETTINGS[1], decoding=Decoding(sampled_drafts=True))
    assert len(sampled.token_ids) == 33


def test_chat_is_its_rendered_text():
    generator = random_generator()
    messages = [{"role": "user", "content": "hello"}]
    answer = generator.chat(messages, SETTINGS[0])
    assert answer.prompt_ids == generator.tokenizer.encode_chat(messages)
    assert answer.token_ids == generator.generate(answer.prompt_ids, SETTINGS[0]).token_ids


def test_settings_come_on_top_of_params():
    generator = counter()
    assert generator.generate("A", SamplingParams(max_new_tokens=9, stop=("F",)), max_new_tokens=3).text == "BCD"


def test_the_second_call_of_a_shape_compiles_nothing():
    generator = random_generator()
    generator.generate("abc", SETTINGS[0])
    programs = len(generator.model._programs)
    again = generator.generate("xyz", max_new_tokens=25, temperature=0.5, seed=9, top_k=3)
    assert again.finish_reason == "length"
    assert len(generator.model._programs) == programs
    assert generator.timing.compile < 0.1
    assert generator.timing.decode > 0


BAD = [
    ([], {}, "no prompts"),
    ([[]], {}, "the prompt is empty"),
    (["A", []], {}, "prompt 1 is empty"),
    (["A", [1, 5000]], {}, "prompt 1: token id 5000 is outside the vocabulary of 266"),
    ([[-1]], {}, "the prompt: token id -1"),
    (["A"], {"max_new_tokens": 1 << 20}, "more than the model's context"),
    (["A", "B"], {"stop_token_ids": (999,)}, "stop_token_ids of prompt 0: token id 999"),
    (["A"], {"logit_bias": {999: 1.0}}, "logit_bias of the prompt: token id 999"),
]


@pytest.mark.parametrize(("prompts", "settings", "said"), BAD, ids=[b[2] for b in BAD])
def test_what_cannot_be_done_is_said_before_anything_is_compiled(prompts, settings, said):
    generator = counter(7)
    with pytest.raises(ValueError, match=said):
        generator.generate_batch(prompts, SamplingParams(**settings))
    assert not generator.model._programs


def test_settings_must_be_one_or_as_many_as_prompts():
    with pytest.raises(ValueError, match="3 prompts but 2 settings"):
        counter().generate_batch(["A"] * 3, [SamplingParams()] * 2)
    with pytest.raises(ValueError, match="verify_length must be 1 to 8"):
        counter().generate("A", decoding=Decoding(verify_length=9))


def test_without_a_tokenizer_ids_still_work():
    generator = counter(0, with_tokenizer=False)
    completion = generator.generate([65], max_new_tokens=3)
    assert isinstance(completion, Completion)
    assert (completion.token_ids, completion.text) == ([66, 67, 68], "")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        generator.generate("A")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generator.generate([65], stop=("x",))


def test_a_round_by_hand_on_a_sessions_state_is_its_next_step():
    model = random_generator().model
    session = Session(model, [[1, 2, 3], [4]], [SamplingParams(max_new_tokens=20)] * 2, Decoding(rounds_per_dispatch=1))
    session.prefill()
    given, asked = (model.models, model.params, session.state), session.requests
    drafts, _ = jax.jit(draft, static_argnums=(0, 4))(*given, asked.sampling, session.verify_length)
    state, by_hand = jax.jit(verify, static_argnums=0)(*given, asked, drafts)
    rounds = session.step().rounds
    assert rounds is not None
    for name in ("drafts", "tokens", "counts", "accepted"):
        np.testing.assert_array_equal(getattr(by_hand, name), getattr(rounds, name)[0])
    np.testing.assert_array_equal(state.cache.lengths, session.state.cache.lengths)
