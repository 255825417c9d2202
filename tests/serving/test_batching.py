"""The engine over real programs: a request's tokens are those it gets alone, whatever else happens."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from mimo_jax.evaluation.score import log_probabilities
from mimo_jax.model import Model
from mimo_jax.request import SamplingParams
from serve.generation import DuplicateRequest, GenerationRequest, InvalidRequest, NotServing, QueueFull
from serve.scripted_device import ScriptedDevice
from tests.models import byte_generator, tiny_model
from tests.serving.engines import CAPACITY, answers, collect, end_of, executor, offline, serving, sizes, tokens_of

VOCABULARY = 300


@pytest.fixture(scope="module")
def model() -> Model:
    from mimo_jax.byte_tokenizer import SMALLEST_VOCABULARY

    return byte_generator(*tiny_model(0, vocab=SMALLEST_VOCABULARY)).model


@pytest.fixture(scope="module")
def device(model):
    made = executor(model, pages=40)  # fewer than all slots can fill
    yield made
    made.close()


def requests(rng: np.random.Generator, count: int, vocabulary: int) -> list[GenerationRequest]:
    """Prompts and outputs of all lengths, greedy and sampled, some with penalties, some with biases."""
    made = []
    for i in range(count):
        params = SamplingParams(
            max_new_tokens=int(rng.integers(1, 40)),
            temperature=float(rng.choice([0.0, 1.0])),
            top_p=float(rng.choice([0.9, 1.0])),
            frequency_penalty=float(rng.choice([0.0, 0.5])),
            logit_bias={int(rng.integers(vocabulary)): 3.0} if i % 3 == 0 else {},
            seed=int(rng.integers(1 << 31)),
        )
        prompt = rng.integers(0, vocabulary, int(rng.integers(1, 70))).tolist()
        made.append(GenerationRequest(f"r{i}", prompt, params))
    return made


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "synchronous"])
async def test_a_batch_gives_the_tokens_of_one(model, device, rng, overlap):
    asked = requests(rng, 7, model.config.vocab_size)
    async with serving(device, model, overlap=overlap) as engine:
        given = await answers(engine, asked)
    for request, events in zip(asked, given, strict=True):
        expected = offline(model, list(request.prompt_ids), request.sampling)
        assert tokens_of(events) == expected
        usage = end_of(events).usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(request.prompt_ids), len(expected))


async def test_a_prefix_hit_changes_neither_tokens_nor_acceptance(model, device, rng):
    prompt = rng.integers(0, model.config.vocab_size, 45).tolist()
    params = SamplingParams(max_new_tokens=24, temperature=1.0, seed=3)
    async with serving(device, model) as engine:
        assert await engine.flush_cache()
        cold = await collect(engine.submit(GenerationRequest("cold", prompt, params)))
        again = await collect(engine.submit(GenerationRequest("again", prompt, params)))
        turn = [*prompt, *tokens_of(cold), 5, 6, 7]
        longer = await collect(engine.submit(GenerationRequest("longer", turn, params)))
    assert end_of(cold).usage.cached_tokens == 0
    assert end_of(again).usage.cached_tokens == len(prompt) - 1
    assert replace(end_of(again).usage, cached_tokens=0) == end_of(cold).usage
    assert tokens_of(again) == tokens_of(cold) == offline(model, prompt, params)
    assert end_of(longer).usage.cached_tokens == len(prompt) + 23
    assert tokens_of(longer) == offline(model, turn, params)


async def test_samples_share_their_prompt_and_differ_by_seed(model, device, rng):
    prompt = rng.integers(0, model.config.vocab_size, 33).tolist()
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=11)
    async with serving(device, model) as engine:
        events = await collect(engine.submit(GenerationRequest("n", prompt, params, n=4)))
    assert tokens_of(events, 0) == offline(model, prompt, params)
    assert len({tuple(tokens_of(events, i)) for i in range(4)}) == 4
    assert [end_of(events, i).usage.cached_tokens for i in range(1, 4)] == [32] * 3


async def test_pages_run_short_and_nobody_notices(model, device, rng):
    asked = [
        GenerationRequest(
            f"r{i}", rng.integers(0, model.config.vocab_size, 30).tolist(), SamplingParams(220, temperature=1.0, seed=i)
        )
        for i in range(4)
    ]
    async with serving(device, model) as engine:
        given = await answers(engine, asked)
        assert engine._scheduler.retractions > 0
    for request, events in zip(asked, given, strict=True):
        assert tokens_of(events) == offline(model, list(request.prompt_ids), request.sampling)


async def test_stop_strings_and_stop_ids_end_a_sample(model, device, rng):
    prompt = rng.integers(0, model.config.vocab_size, 9).tolist()
    whole = offline(model, prompt, SamplingParams(40))
    assert model.tokenizer is not None
    at = next(i for i, t in enumerate(whole) if i > 8 and model.tokenizer.decode([t]).isprintable() and t < 128)
    text = model.tokenizer.decode([whole[at]])
    async with serving(device, model) as engine:
        by_id = await collect(
            engine.submit(GenerationRequest("id", prompt, SamplingParams(40, stop_token_ids=(whole[at],))))
        )
        by_text = await collect(engine.submit(GenerationRequest("text", prompt, SamplingParams(40, stop=(text,)))))
    first = whole.index(whole[at])
    assert tokens_of(by_id) == whole[: first + 1]
    assert (end_of(by_id).reason, end_of(by_id).matched) == ("stop", whole[at])
    assert (end_of(by_text).reason, end_of(by_text).matched) == ("stop", text)
    assert text in model.tokenizer.decode(tokens_of(by_text))
    assert text not in model.tokenizer.decode(tokens_of(by_text)[:-1])


async def test_aborts_and_deadlines_free_everything(model, device, rng):
    import time

    prompt = rng.integers(0, model.config.vocab_size, 60).tolist()
    params = SamplingParams(180, temperature=1.0)
    async with serving(device, model) as engine:
        streams = [engine.submit(GenerationRequest(f"a{i}", prompt, params)) for i in range(5)]
        assert engine.abort("a4", "enough")  # waiting
        await anext(streams[0])
        assert engine.abort("a0", "enough")  # running
        tasks = [asyncio.create_task(collect(s)) for s in streams[1:3]]
        await asyncio.sleep(0.05)
        tasks[0].cancel()  # the client goes away
        late = engine.submit(GenerationRequest("late", prompt, params, deadline=time.monotonic() + 0.05))
        ends = [end_of(await collect(s)) for s in (streams[0], streams[4], late)]
        assert [e.reason for e in ends] == ["abort", "abort", "deadline"]
        assert ends[0].message == "enough"
        assert not engine.abort("a0")
        await asyncio.gather(*tasks, return_exceptions=True)
        await collect(streams[3])


async def test_leaving_between_the_end_and_the_last_message_aborts_nothing(model, device, rng):
    prompt = rng.integers(0, model.config.vocab_size, 9).tolist()
    async with serving(device, model) as engine:
        left = engine.submit(GenerationRequest("same", prompt, SamplingParams(4)))
        while engine._live:
            await asyncio.sleep(0.01)
        # finished, and nobody has heard of it; its id is free
        again = engine.submit(GenerationRequest("same", prompt, SamplingParams(40, ignore_eos=True)))
        await left.aclose()
        assert [e async for e in left] == []
        events = await collect(again)
        assert (end_of(events).reason, len(tokens_of(events))) == ("length", 40)


async def test_what_cannot_be_served_is_refused_at_once(model, device):
    params = SamplingParams(8)
    async with serving(device, model) as engine:
        first = engine.submit(GenerationRequest("same", [1, 2], params))
        with pytest.raises(DuplicateRequest, match="'same'"):
            engine.submit(GenerationRequest("same", [1], params))
        with pytest.raises(InvalidRequest, match="context"):
            engine.submit(GenerationRequest("long", [1] * 300, params))
        with pytest.raises(InvalidRequest, match="outside the vocabulary"):
            engine.submit(GenerationRequest("id", [10**6], params))
        with pytest.raises(QueueFull):
            engine.submit(GenerationRequest("many", [1], params, n=1000))
        await collect(first)
        assert await engine.drain(10)
        with pytest.raises(NotServing):
            engine.submit(GenerationRequest("after", [1], params))


async def test_log_probabilities_are_the_backbones(model, device, rng):
    prompt = rng.integers(0, model.config.vocab_size, 20).tolist()
    params = SamplingParams(20, temperature=1.0, top_p=0.8, seed=5)
    async with serving(device, model) as engine:
        events = await collect(engine.submit(GenerationRequest("l", prompt, params, logprobs=True, top_logprobs=4)))
        plain = await collect(engine.submit(GenerationRequest("p", prompt, params)))
    assert tokens_of(plain) == tokens_of(events)
    tokens = tokens_of(events)
    known = [k for e in events if hasattr(e, "logprobs") for k in e.logprobs]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(known) == len(tokens)
    expected = log_probabilities(model, prompt, tokens)
    for row, (token, k) in enumerate(zip(tokens, known, strict=True)):
        assert k.logprob == pytest.approx(expected[row, token], abs=1e-4)
        best = np.argsort(-expected[row], kind="stable")[:4]
        assert [i for i, _ in k.top] == best.tolist()
        assert [v for _, v in k.top] == pytest.approx(expected[row, best].tolist(), abs=1e-4)


class SlowToCopy:
    """A constraint whose copy is a while in the making; nothing is decoded under it."""

    def copy(self) -> "SlowToCopy":
        time.sleep(0.05)
        return self

    def fill_masks(self, drafts, masks):
        raise AssertionError

    def advance(self, tokens):
        raise AssertionError


async def test_the_engine_runs_on_while_a_request_is_put_together(model):
    device = ScriptedDevice(sizes(slots=1), vocab_size=300, capacity=CAPACITY, seconds=0.001, tokens=1)
    async with serving(device, model) as engine:
        running = asyncio.create_task(collect(engine.submit(GenerationRequest("a", [1], SamplingParams(200)))))
        await asyncio.sleep(0)
        waiting = engine.submit(GenerationRequest("b", [2], SamplingParams(5), n=3, constraint=SlowToCopy()))
        assert engine.abort("b")  # before "a" ends and it has the slot
        assert len(tokens_of(await running)) == 200
        ends = await collect(waiting)
        assert [end_of(ends, index).reason for index in range(3)] == ["abort"] * 3
