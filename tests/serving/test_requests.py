"""What happens to every request, whichever service it came through: it is logged, traced, and can be aborted."""

import asyncio
import logging
import threading
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import sglang_scheduler_pb2
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import SglangSchedulerStub
from tritonclient.grpc import service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from serve.generation import Constraint, InvalidRequest
from serve.logs import RequestLog
from serve.protos.mimo.serve.v1 import generation_pb2
from serve.protos.mimo.serve.v1.generation_pb2_grpc import GenerationStub
from serve.services.requests import Requests
from tests.serving.all_services import all_services
from tests.serving.text_server import TextEngine, byte_tokenizer

HELLO = byte_tokenizer().encode("Hello")
SERVICES = ["scheduler", "text", "whole text", "kserve", "kserve stream"]


class Trace:
    def __init__(self, request_id, metadata):
        self.request_id, self.caller, self.said = request_id, metadata.get("traceparent"), []

    def read(self, prompt_tokens):
        self.said.append(prompt_tokens)

    def close(self, error=""):
        self.said.append(error)


class Tracer:
    def __init__(self):
        self.traces: list[Trace] = []

    def request(self, request_id, metadata):
        self.traces.append(Trace(request_id, metadata))
        return self.traces[-1]


async def ask(channel: grpc.aio.Channel, service: str, **options: Any) -> None:
    """ "Hello", which is echoed."""
    infer: Any = service_pb2.ModelInferRequest  # pyright: ignore[reportAttributeAccessIssue]
    kserve: Any = GRPCInferenceServiceStub(channel)
    asked = infer(model_name="scripted")
    asked.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"Hello")
    pb = generation_pb2
    text = pb.GenerateRequest(text=pb.Text(text="Hello"), request_id="r")
    match service:
        case "scheduler":
            ids = sglang_scheduler_pb2.TokenizedInput(input_ids=HELLO, original_text="Hello")
            request = sglang_scheduler_pb2.GenerateRequest(request_id="r", tokenized=ids)
            async for _ in SglangSchedulerStub(channel).Generate(request, **options):
                pass
        case "text":
            async for _ in GenerationStub(channel).Generate(text, **options):
                pass
        case "whole text":
            await GenerationStub(channel).Complete(text, **options)
        case "kserve":
            await kserve.ModelInfer(asked, **options)
        case "kserve stream":
            async for _ in kserve.ModelStreamInfer(iter([asked]), **options):
                pass


@pytest.mark.parametrize("contents", [False, True])
@pytest.mark.parametrize("service", SERVICES)
async def test_every_service_logs_and_traces(service, contents, caplog):
    caplog.set_level(logging.INFO, "serve.requests")
    tracer: Any = Tracer()
    async with all_services(Requests(TextEngine(), log=RequestLog(contents), tracer=tracer)) as (_, channel):
        await ask(channel, service, metadata=[("traceparent", "somebody")])
    came, ended = (vars(record) for record in caplog.records if record.name == "serve.requests")
    (trace,) = tracer.traces
    assert (came["message"], came["prompt_tokens"]) == ("received", len(HELLO))
    assert (ended["message"], ended["reason"], ended["completion_tokens"]) == ("finished", "length", len(HELLO))
    assert came["request_id"] == ended["request_id"] == trace.request_id
    assert service.startswith("kserve") or trace.request_id == "r"
    assert trace.caller == "somebody"
    assert trace.said == [len(HELLO), ""]
    assert (came.get("prompt"), ended.get("output")) == (("Hello", HELLO) if contents else (None, None))


async def test_a_refusal_ends_its_trace_and_is_not_logged(caplog):
    caplog.set_level(logging.INFO, "serve.requests")
    tracer: Any = Tracer()
    async with all_services(Requests(TextEngine(), tracer=tracer)) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError):
            await GenerationStub(channel).Complete(generation_pb2.GenerateRequest())
        call = GenerationStub(channel).Generate(
            generation_pb2.GenerateRequest(text=generation_pb2.Text(text="Hello"), regex="a")
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
    first, second = (trace.said for trace in tracer.traces)
    assert first == ["there is no prompt: give text, token_ids or chat"]
    assert len(second) == 1
    assert "--grammar-backend" in second[0]
    assert not caplog.records


async def test_who_goes_away_ends_its_trace():
    tracer: Any = Tracer()
    engine = TextEngine(seconds=0.05)
    async with all_services(Requests(engine, tracer=tracer)) as (_, channel):
        call = GenerationStub(channel).Generate(generation_pb2.GenerateRequest(text=generation_pb2.Text(text="Hello")))
        await call.read()
        call.cancel()
        async with asyncio.timeout(5):
            while len(tracer.traces[0].said) < 2:
                await asyncio.sleep(0.01)
    assert tracer.traces[0].said == [len(HELLO), "the client went away"]
    assert not engine.live


class Slow:
    """A compiler that takes until it is let go."""

    def __init__(self):
        self.compiling, self.released = threading.Event(), threading.Event()

    def compile(self, kind: str, text: str) -> Constraint:
        self.compiling.set()
        assert self.released.wait(30)
        if text == "bad":
            raise InvalidRequest("bad grammar")
        constraint: Any = (kind, text)
        return constraint


@pytest.mark.parametrize("through", ["scheduler", "text"])
async def test_an_abort_before_the_engine_knows_the_request_is_not_lost(through):
    """A grammar takes its time to compile; the gateway gives the request up meanwhile."""
    slow, engine, pb = Slow(), TextEngine(), sglang_scheduler_pb2
    async with all_services(Requests(engine, compiler=slow)) as (_, channel):
        stub = SglangSchedulerStub(channel)
        asked = pb.GenerateRequest(
            request_id="a",
            tokenized=pb.TokenizedInput(input_ids=[1, 2, 3]),
            sampling_params=pb.SamplingParams(n=2, json_schema="{}"),
            stream=True,
        )

        async def answers() -> list[Any]:
            return [response async for response in stub.Generate(asked)]

        async def abort(reason: str) -> bool:
            if through == "scheduler":
                return (await stub.Abort(pb.AbortRequest(request_id="a", reason=reason))).success
            request = generation_pb2.AbortRequest(request_id="a", message=reason)
            return (await GenerationStub(channel).Abort(request)).aborted

        first = asyncio.create_task(answers())
        assert await asyncio.to_thread(slow.compiling.wait, 30)
        assert not engine.live
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answers()
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert await abort("gone")
        assert not await abort("again")
        slow.released.set()
        assert [(r.complete.index, r.complete.finish_reason, list(r.complete.output_ids)) for r in await first] == [
            (0, "abort", []),
            (1, "abort", []),
        ]
        assert engine.aborted == [("a", "gone")]
        assert not await abort("too late")
        assert [r.complete.finish_reason for r in await answers() if r.HasField("complete")] == ["length"] * 2


async def test_a_client_that_leaves_while_its_request_is_read_leaves_nothing():
    slow, engine = Slow(), TextEngine()
    requests = Requests(engine, compiler=slow)
    pb = generation_pb2
    async with all_services(requests) as (_, channel):
        asked = pb.GenerateRequest(request_id="a", text=pb.Text(text="Hello"), regex="a")
        call = GenerationStub(channel).Generate(asked)
        assert await asyncio.to_thread(slow.compiling.wait, 30)
        call.cancel()
        async with asyncio.timeout(5):
            while requests._reading:
                await asyncio.sleep(0.01)
        slow.released.set()
        await asyncio.sleep(0.05)
        assert not engine.seen
        await GenerationStub(channel).Complete(asked)
        assert len(engine.seen) == 1
