"""Our own service, asked by a real gRPC client, over an engine that follows a script."""

import asyncio
import json
import math
import subprocess
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.request import SamplingParams
from serve.generation import EngineFailed, InvalidRequest, Status
from serve.protos.mimo.serve.v1 import generation_pb2 as pb
from serve.services.text_service import ADMIN_METHODS
from serve.text.answer import Answer
from tests.conftest import REPOSITORY
from tests.serving.text_server import VOCABULARY, TextEngine, byte_tokenizer, says, serving

HELLO = pb.Text(text="Hello, world")
ASK = pb.Chat(messages=[pb.ChatMessage(role="user", content="What time is it?")])
CLOCK = pb.Tool(
    name="clock",
    description="Tells the time",
    parameters=json.dumps(
        {"type": "object", "properties": {"zone": {"type": "string"}, "digits": {"type": "integer"}}}
    ),
)


def joined(responses, index=0):
    """Text and reasoning of one sample."""
    parts = [getattr(r, r.WhichOneof("event")) for r in responses if r.index == index]
    return "".join(p.text for p in parts), "".join(p.reasoning for p in parts)


def ids_of(responses, index=0):
    return [i for r in responses if r.index == index for i in r.round.token_ids]


def last(responses, index=0):
    return [r for r in responses if r.index == index][-1].finished


async def remaining(call):
    """What `read` has not given yet."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
        responses.append(response)
    return responses


async def refused(call, code, words=""):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == code, caught.value.details()
    assert words in (caught.value.details() or "")
    return caught.value


def test_stubs_are_what_the_compiler_writes(tmp_path):
    subprocess.run(
        ["make", "--silent", "--always-make", "-o", ".venv/.installed", "protos", f"PROTOS_OUT={tmp_path}"],
        cwd=REPOSITORY,
        check=True,
    )
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    assert [path.name for path in written] == ["generation_pb2.py", "generation_pb2.pyi", "generation_pb2_grpc.py"]
    for path in written:
        assert (REPOSITORY / path).read_text() == (tmp_path / path).read_text(), path


ids_beyond = st.lists(st.one_of(st.integers(0, VOCABULARY + 50), st.integers(0x80, 0xFF)), max_size=60)


class TestText:
    @given(ids=ids_beyond, sizes=st.lists(st.integers(1, 8), max_size=60))
    def test_pieces_are_the_one_shot_decoding(self, ids, sizes):
        answer, text, at = Answer(byte_tokenizer()), "", 0
        for size in [*sizes, len(ids)]:
            text += answer.push(ids[at : at + size]).text
            at += size
        assert text + answer.finish().text == byte_tokenizer().decode(ids)

    async def test_a_message_is_a_round(self):
        async with serving(TextEngine(says("a café 🙂", 3))) as served:
            responses = await served.stream(text=HELLO, request_id="one")
            assert {r.request_id for r in responses} == {"one"}
            script = says("a café 🙂", 3)(served.engine.seen[0], 0)
            assert [list(r.round.token_ids) for r in responses[:-1]] == script
            assert [r.round.drafted for r in responses[:-1]] == [0] + [7] * (len(script) - 1)
            assert [r.round.accepted for r in responses[1:-1]] == [len(s) - 1 for s in script[1:]]
            assert joined(responses) == ("a café 🙂", "")
            assert served.engine.seen[0].prompt_ids == byte_tokenizer().encode("Hello, world")

    @pytest.mark.parametrize("raw", [b"\xf0\x9f\x99", b"ok\xff\xfe\xc3", b"\xe6\x9d\xb1\x80\x80", bytes(range(256))])
    async def test_bytes_that_are_no_text(self, raw):
        async with serving(TextEngine(eos_ids=())) as served:
            responses = await served.stream(token_ids=pb.TokenIds(ids=raw))
            assert joined(responses)[0] == raw.decode("utf-8", "replace")
            assert ids_of(responses) == list(raw)

    async def test_complete_is_the_whole_stream(self):
        async with serving(TextEngine()) as served:
            request = {"text": pb.Text(text="naïve café, 東京タワー"), "n": 3, "logprobs": True, "top_logprobs": 2}
            responses = await served.stream(**request)
            whole = await served.stub.Complete(pb.GenerateRequest(**request))
            assert len(whole.request_id) == 32
            assert [s.text for s in whole.samples] == [joined(responses, i)[0] for i in range(3)]
            assert [list(s.token_ids) for s in whole.samples] == [ids_of(responses, i) for i in range(3)]
            assert [s.finished.usage for s in whole.samples] == [last(responses, i).usage for i in range(3)]
            assert all(len(s.logprobs) == len(s.token_ids) for s in whole.samples)

    async def test_usage(self):
        async with serving(TextEngine(says("abcdefgh", 3, end=False))) as served:
            end = last(await served.stream(text=HELLO))
            assert end.reason == pb.FINISH_REASON_LENGTH
            assert end.WhichOneof("matched") is None
            rounds = says("abcdefgh", 3, end=False)(served.engine.seen[0], 0)
            sizes = [len(r) for r in rounds]
            usage = end.usage
            assert usage.prompt_tokens == len(byte_tokenizer().encode("Hello, world"))
            assert usage.completion_tokens == sum(sizes)
            assert usage.rounds == len(sizes) - 1
            assert usage.accepted_length == pytest.approx(sum(sizes[1:]) / usage.rounds)
            assert list(usage.accepted_at) == [sum(s - 1 > p for s in sizes[1:]) for p in range(7)]

    async def test_logprobs_spell_tokens(self):
        async with serving(TextEngine(lambda request, index: [[0xC3, 0xA9]])) as served:
            [response, _] = await served.stream(text=HELLO, logprobs=True, top_logprobs=1)
            assert [t.token for t in response.round.logprobs] == [b"\xc3", b"\xa9"]
            assert [(t.top[0].id, t.top[0].token) for t in response.round.logprobs] == [
                (0xC3, b"\xc3"),
                (0xA9, b"\xa9"),
            ]
            assert response.round.logprobs[0].logprob == -0.5
            [response, _] = await served.stream(text=HELLO)
            assert not response.round.logprobs


class TestStops:
    @given(
        text=st.text("abc ", max_size=30),
        stop=st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3),
        size=st.integers(1, 8),
    )
    def test_text_ends_before_the_first(self, text, stop, size):
        ids = byte_tokenizer().encode(text)
        answer = Answer(byte_tokenizer(), stop)
        got = "".join(answer.push(ids[i : i + size]).text for i in range(0, len(ids), size)) + answer.finish().text
        ends = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
        assert got == (text[: min(ends)[1]] if ends else text)
        assert answer.matched == (min(ends)[2] if ends else None)

    async def test_inside_a_block(self):
        async with serving(TextEngine(says("one two. STOP three", 5))) as served:
            responses = await served.stream(text=HELLO, sampling=pb.Sampling(stop=["STOP", "never"]))
            assert joined(responses)[0] == "one two. "
            end = last(responses)
            assert (end.reason, end.stop) == (pb.FINISH_REASON_STOP, "STOP")
            assert byte_tokenizer().decode(ids_of(responses)).endswith("STOP")
            assert end.usage.completion_tokens == len(ids_of(responses))

    async def test_held_text_comes_with_the_end(self):
        async with serving(TextEngine(says("well, ST"))) as served:
            responses = await served.stream(text=HELLO, sampling=pb.Sampling(stop=["STOP"]))
            assert joined(responses)[0] == "well, ST"
            assert last(responses).text == "ST"
            assert last(responses).stop_token_id == byte_tokenizer().eos_ids[0]

    async def test_a_stop_that_only_the_end_completes(self):
        async with serving(TextEngine(lambda request, index: [[65, 0xC3]], eos_ids=())) as served:
            responses = await served.stream(text=HELLO, sampling=pb.Sampling(stop=["\N{REPLACEMENT CHARACTER}"]))
            assert joined(responses)[0] == "A"
            assert last(responses).reason == pb.FINISH_REASON_STOP
            assert last(responses).stop == "\N{REPLACEMENT CHARACTER}"


class TestChat:
    async def test_thinking_comes_apart(self):
        async with serving(TextEngine(says("<think>so\n</think>\n\nIt is <b>.</think>", 2))) as served:
            responses = await served.stream(chat=ASK)
            assert joined(responses) == ("\n\nIt is <b>.</think>", "so\n")
            assert served.engine.seen[0].prompt_ids == byte_tokenizer().encode_chat(
                [{"role": "user", "content": "What time is it?"}]
            )

    async def test_thinking_off(self):
        async with serving(TextEngine(says("<think>"))) as served:
            off = pb.Chat(messages=ASK.messages, enable_thinking=False)
            assert joined(await served.stream(chat=off)) == ("<think>", "")
            assert byte_tokenizer().decode(served.engine.seen[0].prompt_ids).endswith("<think></think>")

    async def test_text_prompts_are_not_parsed(self):
        said = "<think>a</think><tool_call><function=clock></function></tool_call>"
        async with serving(TextEngine(says(said))) as served:
            assert joined(await served.stream(text=HELLO)) == (said, "")

    async def test_tool_calls(self):
        said = (
            "<think>?</think>One moment.<tool_call>\n<function=clock>\n<parameter=zone>12</parameter>\n"
            "<parameter=digits>4</parameter>\n</function>\n</tool_call><tool_call><function=clock></function></tool_call>"
        )
        async with serving(TextEngine(says(said, 4))) as served:
            chat = pb.Chat(messages=ASK.messages, tools=[CLOCK])
            responses = await served.stream(chat=chat, request_id="r")
            assert joined(responses) == ("One moment.", "?")
            calls = [c for r in responses for c in r.round.tool_calls]
            assert [(c.name, json.loads(c.arguments)) for c in calls] == [
                ("clock", {"zone": "12", "digits": 4}),
                ("clock", {}),
            ]
            assert len({c.id for c in calls}) == 2
            assert last(responses).reason == pb.FINISH_REASON_TOOL_CALLS
            whole = await served.stub.Complete(pb.GenerateRequest(chat=chat, request_id="r"))
            assert list(whole.samples[0].tool_calls) == calls
            # the answer and the tool's words go into the next prompt as they were
            turn = pb.ChatMessage(role="assistant", content="One moment.", reasoning="?", tool_calls=calls)
            told = pb.ChatMessage(role="tool", content="12:00", tool_call_id=calls[0].id)
            again = pb.Chat(messages=[*ASK.messages, turn, told], tools=[CLOCK])
            await served.stream(chat=again)
            text = byte_tokenizer().decode(served.engine.seen[-1].prompt_ids)
            assert "<think>?</think>One moment.<tool_call>\n<function=clock>\n<parameter=zone>12</parameter>" in text
            assert "<tool_response>\n12:00\n</tool_response>" in text

    async def test_a_call_that_the_end_completes(self):
        said = "<think></think><tool_call><function=clock></function></tool_call>"
        async with serving(TextEngine(says(said))) as served:
            chat = pb.Chat(messages=ASK.messages, tools=[CLOCK])
            responses = await served.stream(chat=chat, sampling=pb.Sampling(stop=["</tool_call>!"]))
            assert joined(responses) == ("", "")
            assert [c.name for c in last(responses).tool_calls] == ["clock"]
            assert last(responses).reason == pb.FINISH_REASON_TOOL_CALLS

    async def test_an_unfinished_call_is_text(self):
        async with serving(TextEngine(says("<think></think>x<tool_call><function=clock>"))) as served:
            responses = await served.stream(chat=pb.Chat(messages=ASK.messages, tools=[CLOCK]))
            assert joined(responses)[0] == "x<tool_call><function=clock>"
            assert last(responses).reason == pb.FINISH_REASON_STOP

    @pytest.mark.parametrize(
        ("chat", "words"),
        [
            (pb.Chat(), "messages is empty"),
            (pb.Chat(messages=ASK.messages, tools=[pb.Tool()]), "no name"),
            (pb.Chat(messages=ASK.messages, tools=[pb.Tool(name="f", parameters="{")]), "parameters of tool f"),
            (pb.Chat(messages=ASK.messages, tools=[pb.Tool(name="f", parameters="[]")]), "must be a JSON schema"),
            (
                pb.Chat(messages=[pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(name="f", arguments="{")])]),
                "arguments are no valid JSON",
            ),
        ],
    )
    async def test_malformed_conversations(self, chat, words):
        async with serving(TextEngine()) as served:
            await refused(served.stream(chat=chat), grpc.StatusCode.INVALID_ARGUMENT, words)
            await refused(served.stub.Tokenize(pb.TokenizeRequest(chat=chat)), grpc.StatusCode.INVALID_ARGUMENT, words)


class TestSampling:
    async def test_presence(self):
        defaults = SamplingParams(temperature=1.0, top_p=0.95, stop=("END",))
        async with serving(TextEngine(), defaults=defaults) as served:
            await served.stream(text=HELLO, request_id="x")
            await served.stream(
                text=HELLO, request_id="x", sampling=pb.Sampling(temperature=0, seed=0, max_new_tokens=1)
            )
            await served.stream(text=HELLO, sampling=pb.Sampling(logit_bias={3: -2.5}, stop=["a"], ignore_eos=True))
            first, second, third = (r.sampling for r in served.engine.seen)
            room = 4096 - len(byte_tokenizer().encode("Hello, world"))
            assert (first.temperature, first.top_p, first.max_new_tokens, first.stop) == (1.0, 0.95, room, ("END",))
            assert first.seed > 0
            assert (second.temperature, second.top_p, second.seed, second.max_new_tokens) == (0.0, 0.95, 0, 1)
            assert (third.logit_bias, third.stop, third.ignore_eos) == ({3: -2.5}, ("a",), True)

    async def test_seed_comes_from_the_id(self):
        async with serving(TextEngine()) as served:
            for name in ("a", "a", "b"):
                await served.stream(text=HELLO, request_id=name)
            a, again, b = (r.sampling.seed for r in served.engine.seen)
            assert a == again != b

    async def test_every_scalar_arrives(self):
        sampling = {
            "max_new_tokens": 5,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "seed": 2**32 - 1,
        }
        async with serving(TextEngine()) as served:
            await served.stream(text=HELLO, sampling=pb.Sampling(**sampling, stop_token_ids=[9]))
            assert served.engine.seen[0].sampling == SamplingParams(**sampling, stop_token_ids=(9,))

    @pytest.mark.parametrize(
        ("request_", "words"),
        [
            ({}, "there is no prompt"),
            ({"text": pb.Text()}, "prompt is empty"),
            ({"token_ids": pb.TokenIds(ids=[1, 600])}, "600 is outside the vocabulary"),
            ({"token_ids": pb.TokenIds(ids=[1] * 5000)}, "context of 4096"),
            ({"text": HELLO, "n": 0}, "at least one sample"),
            ({"text": HELLO, "n": 1000}, "more than the 128"),
            ({"text": HELLO, "top_logprobs": 1}, "needs logprobs"),
            ({"text": HELLO, "logprobs": True, "top_logprobs": 99}, "more than the 20"),
            ({"text": HELLO, "sampling": pb.Sampling(temperature=-1)}, "temperature must be"),
            ({"text": HELLO, "sampling": pb.Sampling(top_p=math.nan)}, "top_p must be"),
            ({"text": HELLO, "sampling": pb.Sampling(max_new_tokens=0)}, "max_new_tokens must be"),
            ({"text": HELLO, "sampling": pb.Sampling(max_new_tokens=9999)}, "asks for 9999"),
            ({"text": HELLO, "sampling": pb.Sampling(seed=2**40)}, "seed must be"),
            ({"text": HELLO, "sampling": pb.Sampling(stop=[""])}, "must not be empty"),
            ({"text": HELLO, "sampling": pb.Sampling(stop_token_ids=[999])}, "999 is outside"),
        ],
    )
    async def test_what_cannot_be_served(self, request_, words):
        async with serving(TextEngine()) as served:
            await refused(served.stream(**request_), grpc.StatusCode.INVALID_ARGUMENT, words)
            await refused(served.stub.Complete(pb.GenerateRequest(**request_)), grpc.StatusCode.INVALID_ARGUMENT, words)
            assert not served.engine.seen


class Compiler:
    """Notes what it is asked for."""

    def __init__(self):
        self.asked = []

    def compile(self, kind, text):
        if text == "bad":
            raise InvalidRequest("line 1: what is bad?")
        self.asked.append((kind, text))
        return self

    def fill_masks(self, drafts, masks): ...
    def advance(self, tokens): ...
    def copy(self):
        return self


class TestConstraints:
    async def test_kinds(self):
        compiler = Compiler()
        async with serving(TextEngine(), compiler=compiler) as served:
            await served.stream(text=HELLO, json_schema="{}")
            await served.stream(text=HELLO, regex="a*")
            await served.stream(text=HELLO, lark="start: /a/")
            await served.stream(text=HELLO, choices=pb.Choices(choices=["ä", "b"]))
            assert [(k, json.loads(t) if k == "choices" else t) for k, t in compiler.asked] == [
                ("json_schema", "{}"),
                ("regex", "a*"),
                ("lark", "start: /a/"),
                ("choices", ["ä", "b"]),
            ]
            assert all(r.constraint is compiler for r in served.engine.seen)
            await served.stream(chat=pb.Chat(messages=ASK.messages, enable_thinking=False), regex="a")
            assert served.engine.seen[-1].constraint is compiler
            await served.stream(chat=ASK, regex="a")
            assert served.engine.seen[-1].constraint is not compiler  # it waits for the end of the thinking
            await refused(served.stream(text=HELLO, regex="bad"), grpc.StatusCode.INVALID_ARGUMENT, "what is bad")

    async def test_without_a_compiler(self):
        async with serving(TextEngine()) as served:
            await refused(served.stream(text=HELLO, regex="a"), grpc.StatusCode.UNIMPLEMENTED, "grammar-backend")


TOOLS = pb.Chat(messages=ASK.messages, tools=[CLOCK, pb.Tool(name="other")], enable_thinking=False)


def choosing(**choice):
    chat = pb.Chat(**choice)
    chat.MergeFrom(TOOLS)
    return chat


class TestToolChoice:
    async def test_none_is_as_without_tools(self):
        said = "<think></think><tool_call><function=clock></function></tool_call>"
        async with serving(TextEngine(says(said))) as served:
            responses = await served.stream(chat=choosing(tool_choice=pb.TOOL_CHOICE_NONE))
            await served.stream(chat=pb.Chat(messages=ASK.messages, enable_thinking=False))
            with_tools, without = (list(r.prompt_ids) for r in served.engine.seen)
            assert with_tools == without
            assert "<tool_call>" in joined(responses)[0]
            assert last(responses).reason == pb.FINISH_REASON_STOP

    async def test_required_is_a_constraint(self):
        compiler = Compiler()
        async with serving(TextEngine(), compiler=compiler) as served:
            await served.stream(chat=choosing(tool_choice=pb.TOOL_CHOICE_REQUIRED))
            await served.stream(chat=choosing(tool_choice=pb.TOOL_CHOICE_REQUIRED, required_tool="other"))
            (kind, every), (_, one) = compiler.asked
            assert kind == "lark"
            assert ["=clock>" in g for g in (every, one)] == [True, False]
            assert ["=other>" in g for g in (every, one)] == [True, True]
            assert served.engine.seen[0].constraint is compiler
            await served.stream(chat=TOOLS)
            assert served.engine.seen[-1].constraint is None

    @pytest.mark.parametrize(
        ("request_", "words"),
        [
            ({"chat": pb.Chat(messages=ASK.messages, tool_choice=pb.TOOL_CHOICE_REQUIRED)}, "needs tools"),
            ({"chat": choosing(tool_choice=pb.TOOL_CHOICE_REQUIRED, required_tool="x")}, "there are clock, other"),
            ({"chat": choosing(required_tool="clock")}, "goes with TOOL_CHOICE_REQUIRED"),
            ({"chat": choosing(tool_choice=pb.TOOL_CHOICE_REQUIRED), "regex": "a"}, "ask for one of them"),
        ],
    )
    async def test_what_cannot_be(self, request_, words):
        async with serving(TextEngine(), compiler=Compiler()) as served:
            await refused(served.stream(**request_), grpc.StatusCode.INVALID_ARGUMENT, words)


class TestStreamInterval:
    async def test_rounds_are_put_together(self):
        text = "Hello, 東京 and more of it."
        answers = []
        async with serving(TextEngine(says(text)), stream_interval=1) as served:
            for interval in (None, 1, 7, 1000):
                settings = {} if interval is None else {"stream_interval": interval}
                responses = await served.stream(text=HELLO, logprobs=True, **settings)
                sizes = [len(r.round.token_ids) for r in responses[:-1]]
                assert all(size >= (interval or 1) for size in sizes[:-1])
                assert len(sizes) == 1 or interval != 1000
                assert [len(r.round.logprobs) for r in responses[:-1]] == sizes
                rounds = [r.round for r in responses[:-1]]
                answers.append(
                    (
                        joined(responses),
                        [t for r in rounds for t in r.token_ids],
                        sum(r.drafted for r in rounds),
                        sum(r.accepted for r in rounds),
                        last(responses).usage,
                    )
                )
        assert answers[0][0][0] == text
        assert all(answer == answers[0] for answer in answers)

    async def test_the_servers_own(self):
        async with serving(TextEngine(says("a" * 30)), stream_interval=10) as served:
            assert len(await served.stream(text=HELLO)) == 4
            assert len(await served.stream(text=HELLO, stream_interval=1)) > 10


class TestLife:
    async def test_refusals(self):
        engine = TextEngine(says("a" * 60, 1), seconds=0.05, max_running=1, max_queued=0)
        async with serving(engine) as served:
            call = served.stub.Generate(pb.GenerateRequest(text=HELLO, request_id="x"))
            await call.read()
            error = await refused(served.stream(text=HELLO), grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"
            await refused(served.stream(text=HELLO, request_id="x"), grpc.StatusCode.ALREADY_EXISTS, "x")
            engine.status = Status.STARTING
            await refused(served.stream(text=HELLO), grpc.StatusCode.UNAVAILABLE, "starting")
            call.cancel()
            await served.settle()

    @pytest.mark.parametrize("after", [0, 1, 3])
    @pytest.mark.parametrize("method", ["Generate", "Complete"])
    async def test_cancelling_ends_the_request(self, method, after):
        async with serving(TextEngine(says("a" * 1000, 1), seconds=0.01)) as served:
            call = getattr(served.stub, method)(pb.GenerateRequest(text=HELLO, n=2))
            if method == "Generate":
                for _ in range(after):
                    await call.read()
            else:
                await asyncio.sleep(0.01 * after)
            call.cancel()
            await asyncio.sleep(0)
            await served.settle()
            assert served.engine.aborted == []  # closing the iterator is enough

    async def test_abort(self):
        async with serving(TextEngine(says("a" * 1000, 1), seconds=0.01)) as served:
            call = served.stub.Generate(pb.GenerateRequest(text=HELLO, request_id="x"))
            await call.read()
            abort = pb.AbortRequest(request_id="x", message="enough")
            assert (await served.stub.Abort(abort)).aborted
            assert not (await served.stub.Abort(abort)).aborted
            assert not (await served.stub.Abort(pb.AbortRequest(request_id="unknown"))).aborted
            rest = await remaining(call)
            assert last(rest).reason == pb.FINISH_REASON_ABORT
            assert last(rest).message == "enough"
            assert await call.code() == grpc.StatusCode.OK
            assert not (await served.stub.Abort(abort)).aborted

    async def test_deadlines(self):
        async with serving(TextEngine(says("a" * 1000, 1), seconds=0.02), max_seconds=0.2) as served:
            await refused(served.stream(text=HELLO), grpc.StatusCode.DEADLINE_EXCEEDED, "longer than it may")
            call = served.stub.Complete(pb.GenerateRequest(text=HELLO), timeout=0.1)
            await refused(call, grpc.StatusCode.DEADLINE_EXCEEDED)
            await served.settle()

    async def test_a_dead_engine(self):
        def script(request, index):
            yield [65]
            raise EngineFailed("a device is gone")

        async with serving(TextEngine(script)) as served:
            call = served.stub.Generate(pb.GenerateRequest(text=HELLO))
            assert (await call.read()).round.text == "A"
            await refused(call.read(), grpc.StatusCode.INTERNAL, "a device is gone")

    async def test_drain(self):
        async with serving(TextEngine(says("a" * 20, 1), seconds=0.01)) as served:
            call = served.stub.Generate(pb.GenerateRequest(text=HELLO))
            await call.read()
            drained = served.stub.Drain(pb.DrainRequest(timeout_seconds=5))
            await asyncio.sleep(0.03)
            await refused(served.stream(text=HELLO), grpc.StatusCode.UNAVAILABLE, "draining")
            assert joined(await remaining(call))[0].endswith("a")
            assert (await drained).clean
            await refused(
                served.stub.Drain(pb.DrainRequest(timeout_seconds=-1)), grpc.StatusCode.INVALID_ARGUMENT, "0 or more"
            )

    async def test_load(self):
        engine = TextEngine()
        async with serving(engine) as served:
            watch = served.stub.WatchLoad(pb.WatchLoadRequest(interval_seconds=0.1))
            first = await watch.read()
            assert (first.status, first.slots, first.total_tokens) == (pb.STATUS_READY, 8, 1 << 16)
            engine.status = Status.STOPPED
            assert [load.status for load in await remaining(watch)] == [pb.STATUS_STOPPED]
            quick = served.stub.WatchLoad(pb.WatchLoadRequest(interval_seconds=0))
            await refused(quick.read(), grpc.StatusCode.INVALID_ARGUMENT, "at least 0.1")

    async def test_flush(self):
        async with serving(TextEngine(says("a" * 1000, 1), seconds=0.01)) as served:
            assert (await served.stub.FlushCache(pb.FlushCacheRequest())).flushed
            call = served.stub.Generate(pb.GenerateRequest(text=HELLO))
            await call.read()
            assert not (await served.stub.FlushCache(pb.FlushCacheRequest())).flushed
            call.cancel()
            await served.settle()


class TestInformation:
    async def test_server_info(self):
        settings = {"tp_size": 8, "model": Path("/models/x"), "stop": (1, 2), "nothing": None}
        engine = TextEngine(settings=settings, architecture="MiMoV2")
        async with serving(engine, compiler=Compiler(), defaults=SamplingParams(temperature=0.5)) as served:
            info = await served.stub.GetServerInfo(pb.GetServerInfoRequest())
            assert (info.model, info.architecture, info.status) == ("scripted", "MiMoV2", pb.STATUS_READY)
            assert (info.context_length, info.block_size, list(info.eos_ids)) == (4096, 8, list(engine.info.eos_ids))
            assert list(info.capabilities.constraints) == ["json_schema", "regex", "lark", "choices"]
            assert info.capabilities.reasoning
            assert info.capabilities.tools
            assert info.default_sampling.temperature == 0.5
            assert not info.default_sampling.HasField("seed")
            assert info.settings["tp_size"] == 8
            assert info.settings["model"] == "/models/x"
            assert list(info.settings["stop"]) == [1, 2]

    async def test_constraints_are_fields_of_the_request(self):
        fields = pb.GenerateRequest.DESCRIPTOR.oneofs_by_name["constraint"].fields
        async with serving(TextEngine(), compiler=Compiler()) as served:
            info = await served.stub.GetServerInfo(pb.GetServerInfoRequest())
            assert list(info.capabilities.constraints) == [f.name for f in fields]

    async def test_tokenize_and_back(self):
        async with serving(TextEngine()) as served:
            text = "<|im_end|> 東京\n"

            async def ids(**request):
                return list((await served.stub.Tokenize(pb.TokenizeRequest(**request))).ids)

            plain = await ids(text=pb.Text(text=text))
            assert plain == byte_tokenizer().encode(text)
            special = await ids(text=pb.Text(text=text, parse_special=True))
            assert special == byte_tokenizer().encode(text, parse_special=True) != plain
            assert await ids(chat=ASK) == byte_tokenizer().encode_chat(
                [{"role": "user", "content": "What time is it?"}]
            )
            for keep, expected in ((True, text), (False, " 東京\n")):
                request = pb.DetokenizeRequest(ids=special, keep_special=keep)
                assert (await served.stub.Detokenize(request)).text == expected
            await refused(served.stub.Tokenize(pb.TokenizeRequest()), grpc.StatusCode.INVALID_ARGUMENT, "nothing")

    async def test_admin_methods_exist(self):
        async with serving(TextEngine()) as served:
            for method in ADMIN_METHODS:
                await served.channel.unary_unary(method)(b"")
