"""SGLang's scheduler service over a scripted engine, called with the stubs that gateways use."""

import asyncio
import hashlib
import io
import json
import subprocess
import sys
import time
import zipfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import (
    SglangSchedulerStub,
    add_SglangSchedulerServicer_to_server,
)

from mimo_jax.presets import NANO
from serve.generation import InvalidRequest, Status
from serve.services import scheduler_service
from serve.services.grpc_server import GrpcServer, Service
from serve.services.requests import Requests
from serve.services.scheduler_service import SERVICE_NAME, UNSUPPORTED, SchedulerService
from tests.serving.scripted_engine import ScriptedEngine


class Compiler:
    """Knows one schema."""

    def compile(self, kind: str, text: str) -> Any:
        if kind != "json_schema":
            raise InvalidRequest(f"{kind}: bad grammar")
        return (kind, text)


@asynccontextmanager
async def served(engine: ScriptedEngine, **options: Any):
    """The service on a free port: its address and its stub."""
    requests = Requests(engine, compiler=Compiler(), max_seconds=options.pop("max_seconds", None))
    service = SchedulerService(requests, NANO, NANO)
    listed = Service(SERVICE_NAME, add_SglangSchedulerServicer_to_server, service, scheduler_service.ADMIN_METHODS)
    server = GrpcServer(engine, [listed], "127.0.0.1:0", **options)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield server, channel, SglangSchedulerStub(channel)
    finally:
        await server.stop(0.1)


def message(request_id: str = "r", ids: Any = range(1, 20), stream: bool = True, **sampling: Any) -> pb.GenerateRequest:
    top = {k: sampling.pop(k) for k in ("return_logprob", "top_logprobs_num", "lora_id") if k in sampling}
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(input_ids=list(ids)),
        sampling_params=pb.SamplingParams(**{"max_new_tokens": 100, **sampling}),
        stream=stream,
        **top,
    )


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def test_a_stream_gives_deltas_and_then_everything():
    async with served(ScriptedEngine()) as (_, _, stub):
        given = [r async for r in stub.Generate(message())]
        chunks, last = [r.chunk for r in given[:-1]], given[-1].complete
        assert [t for c in chunks for t in c.token_ids] == list(last.output_ids) == list(range(1, 20))
        assert [c.completion_tokens for c in chunks] == [1, 4, 7, 10, 13, 16, 19]
        assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("length", 19, 19)
        assert (last.spec_accepted_tokens, last.spec_draft_tokens) == (12, 42)
        (alone,) = [r async for r in stub.Generate(message(stream=False))]
        assert alone.complete == last


async def test_messages_hold_as_many_tokens_as_asked_for():
    async with served(ScriptedEngine()) as (_, _, stub):
        given = [r async for r in stub.Generate(message(stream_interval=6))]
        assert [len(r.chunk.token_ids) for r in given[:-1]] == [7, 6, 6]


async def test_zeros_stand_for_what_is_not_set():
    engine = ScriptedEngine()
    async with served(engine) as (_, _, stub):
        async for _ in stub.Generate(message("a")):
            pass
        async for _ in stub.Generate(message("a", temperature=1.0, top_k=-1, top_p=0.5, custom_params={"seed": 7})):
            pass
    first, second = (request.sampling for request in engine.seen)
    assert (first.top_p, first.top_k, first.repetition_penalty, first.temperature) == (1.0, 0, 1.0, 0.0)
    assert (second.top_p, second.top_k, second.seed) == (0.5, 0, 7)
    again = ScriptedEngine()
    async with served(again) as (_, _, stub):
        async for _ in stub.Generate(message("a")):
            pass
    assert again.seen[0].sampling.seed == first.seed != 0


async def test_samples_log_probabilities_stops_and_constraints():
    engine = ScriptedEngine()
    asked = message(
        n=2, stop_token_ids=[5], return_logprob=True, top_logprobs_num=3, logit_bias={"9": 1.5}, json_schema="{}"
    )
    async with served(engine) as (_, _, stub):
        given = [r async for r in stub.Generate(asked)]
    ends = [r.complete for r in given if r.HasField("complete")]
    assert [e.index for e in ends] == [0, 1]
    assert all((e.finish_reason, e.matched_token_id, list(e.output_ids)) == ("stop", 5, [1, 2, 3, 4, 5]) for e in ends)
    known = ends[0].output_logprobs
    assert list(known.token_logprobs) == [-0.5] * 5
    assert list(known.token_ids) == [1, 2, 3, 4, 5]
    assert [len(t.values) for t in known.top_logprobs] == [3] * 5
    assert engine.seen[0].constraint == ("json_schema", "{}")
    assert engine.seen[0].sampling.logit_bias == {9: 1.5}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"ids": []}, "INVALID_ARGUMENT", "input_ids is empty"),
        ({"request_id": ""}, "INVALID_ARGUMENT", "request_id is empty"),
        ({"temperature": -1.0}, "INVALID_ARGUMENT", "temperature must be"),
        ({"temperature": float("nan")}, "INVALID_ARGUMENT", "temperature must be"),
        ({"top_p": 2.0}, "INVALID_ARGUMENT", "top_p must be"),
        ({"n": 1000}, "INVALID_ARGUMENT", "samples of one prompt"),
        ({"stop": ["x"] * 99}, "INVALID_ARGUMENT", "stop strings"),
        ({"stop": [""]}, "INVALID_ARGUMENT", "stop string"),
        ({"stop_token_ids": list(range(99))}, "INVALID_ARGUMENT", "stop tokens"),
        ({"logit_bias": {"x": 1.0}}, "INVALID_ARGUMENT", "keyed by token ids"),
        ({"regex": "("}, "INVALID_ARGUMENT", "bad grammar"),
        ({"max_new_tokens": 10**6}, "INVALID_ARGUMENT", "context"),
        ({"custom_params": {"seed": -1}}, "INVALID_ARGUMENT", "custom_params.seed"),
        ({"custom_params": {"seed": float("nan")}}, "INVALID_ARGUMENT", "custom_params.seed"),
        ({"custom_params": {"seed": float("inf")}}, "INVALID_ARGUMENT", "custom_params.seed"),
        ({"custom_params": {"seed": 2.5}}, "INVALID_ARGUMENT", "custom_params.seed"),
        ({"lora_id": "x"}, "UNIMPLEMENTED", "lora_id"),
        ({"min_new_tokens": 3}, "UNIMPLEMENTED", "min_new_tokens"),
    ],
)
async def test_bad_requests_are_told_what_is_wrong(changes, code, words):
    engine = ScriptedEngine()
    async with served(engine) as (_, _, stub):
        error = await refused(stub.Generate(message(**changes)))
        assert error.code().name == code
        assert words in (error.details() or "")
        assert not engine.live


async def test_full_duplicate_and_draining():
    engine = ScriptedEngine(seconds=0.05, max_running=1, max_queued=0)
    async with served(engine) as (_, _, stub):
        first = stub.Generate(message("one"))
        await first.read()
        error = await refused(stub.Generate(message("one")))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        error = await refused(stub.Generate(message("two")))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "1500"
        engine.status = Status.DRAINING
        error = await refused(stub.Generate(message("three")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert not (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        first.cancel()


async def test_abort_ends_a_stream_normally_and_an_unknown_id_is_no_error():
    engine = ScriptedEngine(seconds=0.02)
    async with served(engine) as (_, _, stub):
        call = aiter(stub.Generate(message("a", ids=range(1, 300))))
        await anext(call)
        assert (await stub.Abort(pb.AbortRequest(request_id="a", reason="enough"))).success
        rest = [r async for r in call]
        assert rest[-1].complete.finish_reason == "abort"
        assert not (await stub.Abort(pb.AbortRequest(request_id="a"))).success
        assert engine.aborted == [("a", "enough")]


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect", "server"])
async def test_whoever_goes_away_leaves_nothing_behind(how):
    engine = ScriptedEngine(seconds=0.02)
    async with served(engine, max_seconds=0.1 if how == "server" else None) as (server, _, stub):
        if how == "disconnect":
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as other:
                await SglangSchedulerStub(other).Generate(message(ids=range(1, 300))).read()
        else:
            call = stub.Generate(message(ids=range(1, 300)), timeout=0.15 if how == "deadline" else None)
            answers = aiter(call)
            await anext(answers)
            if how == "cancel":
                call.cancel()
            else:
                error = await refused(answers)
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        for _ in range(100):
            if not engine.live:
                break
            await asyncio.sleep(0.02)
        assert not engine.live
        # and the server goes on
        assert [r async for r in stub.Generate(message("next", ids=[1, 2]))][-1].complete.finish_reason == "length"


async def test_what_is_served():
    engine = ScriptedEngine(settings={"tp_size": 16, "model_path": "x"})
    async with served(engine) as (_, _, stub):
        info = await stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.served_model_name, info.max_context_length, info.vocab_size) == ("scripted", 4096, 512)
        assert list(info.eos_token_ids) == [0]
        server = await stub.GetServerInfo(pb.GetServerInfoRequest())
        assert server.server_args["tp_size"] == 16
        loads = await stub.GetLoads(pb.GetLoadsRequest())
        assert loads.loads[0].max_running_requests == 8
        assert (await stub.FlushCache(common_pb2.FlushCacheRequest())).success
        assert (await stub.StartProfile(common_pb2.StartProfileRequest())).success
        assert (await stub.StopProfile(common_pb2.StopProfileRequest())).success
        for name in UNSUPPORTED:
            asked = getattr(stub, name)
            kind = "Subscribe" in name
            request = {
                "Embed": pb.EmbedRequest(),
                "LoadLoRAAdapter": pb.LoadLoRAAdapterRequest(),
                "UnloadLoRAAdapter": pb.UnloadLoRAAdapterRequest(),
                "ListLoadedLoRAAdapters": pb.ListLoadedLoRAAdaptersRequest(),
                "SubscribeKvEvents": common_pb2.SubscribeKvEventsRequest(),
            }[name]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (asked(request).read() if kind else asked(request))
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_tokenizer_arrives_whole():
    async with served(ScriptedEngine()) as (_, _, stub):
        chunks = [c async for c in stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
    data = b"".join(c.data for c in chunks)
    assert [bool(c.sha256) for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    files = zipfile.ZipFile(io.BytesIO(data))
    assert files.read("tokenizer.json") == (NANO / "tokenizer.json").read_bytes()


async def test_health_follows_the_engine_and_does_not_hold_up_the_end():
    engine = ScriptedEngine()
    async with served(engine) as (server, channel, _):
        health: Any = HealthStub(channel)
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        whole = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == (await whole.read()).status == serving
        engine.status = Status.DRAINING
        assert (await watch.read()).status == not_serving
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == serving
        engine.status = Status.FAILED
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == not_serving
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert (await whole.read()).status == not_serving
        engine.status = Status.READY
        assert (await watch.read()).status == (await whole.read()).status == serving
        begun = time.monotonic()
        await server.stop(30)
        assert time.monotonic() - begun < 5
        for each in (watch, whole):
            assert (await each.read()).status == not_serving
            assert not await each.read()  # the end
            assert await each.code() is grpc.StatusCode.OK


async def test_keys():
    engine = ScriptedEngine()
    async with served(engine, api_key="user", admin_key="root") as (_, channel, stub):

        async def code(key: str | None, admin: bool = False) -> str:
            metadata = [("authorization", f"Bearer {key}")] if key else []
            try:
                if admin:
                    await stub.FlushCache(common_pb2.FlushCacheRequest(), metadata=metadata)
                else:
                    await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        assert [await code(k) for k in (None, "wrong", "user", "root")] == ["UNAUTHENTICATED"] * 2 + ["OK"] * 2
        assert [await code(k, admin=True) for k in (None, "wrong", "user", "root")] == [
            "UNAUTHENTICATED",
            "UNAUTHENTICATED",
            "PERMISSION_DENIED",
            "OK",
        ]
        error = await refused(stub.Generate(message()))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        open_to_all: Any = HealthStub(channel)
        await open_to_all.Check(health_pb2.HealthCheckRequest())


async def test_reflection_serves_tools_that_have_no_stubs():
    async with served(ScriptedEngine()) as (server, _, _):

        async def buf(*arguments: str) -> str:
            tool = Path(sys.executable).with_name("buf")
            process = await asyncio.create_subprocess_exec(
                tool,
                "curl",
                "--http2-prior-knowledge",
                "--protocol",
                "grpc",
                *arguments,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            out, err = await process.communicate()
            assert process.returncode == 0, err.decode()
            return out.decode()

        address = f"http://127.0.0.1:{server.port}"
        assert f"{SERVICE_NAME}/Generate" in await buf("--list-methods", address)
        info = json.loads(await buf("-d", "{}", f"{address}/{SERVICE_NAME}/GetModelInfo"))
        assert info["servedModelName"] == "scripted"
        asked = {"request_id": "b", "tokenized": {"input_ids": [4, 5]}, "sampling_params": {"max_new_tokens": 9}}
        answer = await buf("-d", json.dumps(asked), f"{address}/{SERVICE_NAME}/Generate")
        assert json.loads(answer)["complete"]["outputIds"] == [4, 5]
