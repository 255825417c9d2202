"""The KServe service, asked by Triton's own client."""

import asyncio
import json
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.grpc import service_pb2
from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from tritonclient.utils import InferenceServerException

from mimo_jax.request import SamplingParams
from serve.generation import EngineFailed, Status
from serve.services.answering import Answering
from serve.services.grpc_server import GrpcServer, Service
from serve.services.kserve_service import SERVICE_NAME, KServeService
from serve.services.requests import Requests
from tests.serving.text_server import TextEngine, byte_tokenizer, says


@asynccontextmanager
async def client(engine, defaults=None, **requests):
    service = KServeService(Answering(Requests(engine, **requests), byte_tokenizer(), defaults))
    listed = Service(SERVICE_NAME, add_GRPCInferenceServiceServicer_to_server, service)
    server = GrpcServer(engine, [listed], "127.0.0.1:0")
    await server.start()
    try:
        async with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as connected:
            yield cast(Any, connected)
    finally:
        await server.stop(0.2)


def tensor(name: str, value: Any):
    flag = isinstance(value, bool)
    given = triton.InferInput(name, [1], "BOOL" if flag else "BYTES")
    given.set_data_from_numpy(np.array([value], bool) if flag else np.array([value.encode()], object))
    return given


def inputs(text="Hello", **more):
    return [tensor("text_input", text), *(tensor(name, value) for name, value in more.items())]


def text_of(result):
    [text] = result.as_numpy("text_output")
    return text.decode()


def final(result):
    return result.get_response().parameters["triton_final_response"].bool_param


def reason(result):
    return result.get_response().parameters["finish_reason"].string_param


async def test_what_it_is():
    engine = TextEngine()
    async with client(engine) as asked:
        assert await asked.is_server_live()
        assert await asked.is_server_ready()
        assert await asked.is_model_ready("scripted")
        assert not await asked.is_model_ready("other")
        assert (await asked.get_server_metadata()).name == "mimo-jax"
        metadata = await asked.get_model_metadata("scripted")
        assert [(i.name, i.datatype) for i in metadata.inputs] == [
            ("text_input", "BYTES"),
            ("stream", "BOOL"),
            ("sampling_parameters", "BYTES"),
        ]
        assert [o.name for o in metadata.outputs] == ["text_output"]
        assert (await asked.get_model_config("scripted")).config.model_transaction_policy.decoupled
        for method in (asked.get_model_metadata, asked.get_model_config):
            with pytest.raises(InferenceServerException, match="serves scripted"):
                await method("other")
        engine.status = Status.DRAINING
        assert await asked.is_server_live()
        assert not await asked.is_server_ready()
        assert not await asked.is_model_ready("scripted")
        engine.status = Status.FAILED
        assert not await asked.is_server_live()


async def test_infer():
    engine = TextEngine(says("a café 🙂, STOP"))
    async with client(engine, defaults=SamplingParams(temperature=0.5)) as asked:
        given = {"max_tokens": 20, "top_k": 5, "stop": "STOP", "seed": 7, "logit_bias": {"3": 1.5}}
        result = await asked.infer("scripted", inputs(sampling_parameters=json.dumps(given)), request_id="mine")
        assert text_of(result) == "a café 🙂, "
        assert (final(result), reason(result), result.get_response().id) == (True, "stop", "mine")
        assert engine.seen[0].prompt_ids == byte_tokenizer().encode("Hello")
        assert engine.seen[0].sampling == SamplingParams(
            max_new_tokens=20, temperature=0.5, top_k=5, stop=("STOP",), seed=7, logit_bias={3: 1.5}
        )
        # as a parameter of the request, and contents that are not raw
        result = await asked.infer("scripted", inputs(), parameters={"sampling_parameters": '{"max_new_tokens": 1}'})
        assert (text_of(result), reason(result)) == ("a", "length")


async def test_contents_that_are_not_raw():
    async with client(TextEngine(says("yes"))) as asked:
        pb: Any = service_pb2
        request = pb.ModelInferRequest(model_name="scripted")
        for name, kind, contents in (
            ("text_input", "BYTES", pb.InferTensorContents(bytes_contents=[b"Hello"])),
            ("stream", "BOOL", pb.InferTensorContents(bool_contents=[False])),
        ):
            request.inputs.add(name=name, datatype=kind, shape=[1], contents=contents)
        response = await asked._client_stub.ModelInfer(request)
        assert response.raw_output_contents == [b"\x03\x00\x00\x00yes"]


async def streamed(asked, *requests):
    """Results of requests that share one stream, by id."""

    async def ask():
        for request in requests:
            yield {"model_name": "scripted", **request}
        await asyncio.Event().wait()  # the stream stays open, as a client's does

    results: dict[str, list] = {"error": [], **{request["request_id"]: [] for request in requests}}
    ended = 0
    responses = asked.stream_infer(ask())
    async for result, error in responses:
        if error is not None:
            results["error"].append(error)
        else:
            results[result.get_response().id].append(result)
        ended += error is not None or final(result)
        if ended == len(requests):
            break
    responses.cancel()
    return results


async def test_stream():
    engine = TextEngine(says("a café 🙂, and more", 3), seconds=0.002)
    async with client(engine) as asked:
        stream = inputs(stream=True)
        results = await streamed(
            asked,
            {"inputs": stream, "request_id": "a"},
            {"inputs": stream, "request_id": "b"},
            {"inputs": inputs(), "request_id": "whole"},
        )
        for name in "ab":
            assert "".join(map(text_of, results[name])) == "a café 🙂, and more"
            assert len(results[name]) == len(says("a café 🙂, and more", 3)(engine.seen[0], 0)) + 1
            assert [final(r) for r in results[name]] == [False] * (len(results[name]) - 1) + [True]
            assert reason(results[name][-1]) == "stop"
        assert [text_of(r) for r in results["whole"]] == ["a café 🙂, and more"]


async def test_one_bad_request_leaves_the_others_of_its_stream_alone():
    async with client(TextEngine(says("fine", 1), seconds=0.01)) as asked:
        results = await streamed(
            asked,
            {"inputs": inputs(stream=True), "request_id": "good"},
            {"inputs": inputs(sampling_parameters='{"temperature": -1}'), "request_id": "bad"},
            {"inputs": inputs(), "request_id": "unknown", "model_name": "other"},
        )
        assert "".join(map(text_of, results["good"])) == "fine"
        messages = " ".join(map(str, results["error"]))
        assert "temperature must be" in messages
        assert "serves scripted" in messages


async def test_a_closed_stream_ends_its_requests():
    engine = TextEngine(says("a" * 1000, 1), seconds=0.005)
    async with client(engine) as asked:

        async def ask():
            yield {"model_name": "scripted", "inputs": inputs(stream=True)}
            await asyncio.Event().wait()

        responses = asked.stream_infer(ask())
        async for _ in responses:
            break
        assert engine.live
        responses.cancel()
        async with asyncio.timeout(5):
            while engine.live:
                await asyncio.sleep(0.005)


async def test_a_dead_engine():
    def script(request, index):
        yield [65]
        raise EngineFailed("a device is gone")

    async with client(TextEngine(script)) as asked:
        with pytest.raises(InferenceServerException, match="a device is gone"):
            await asked.infer("scripted", inputs())
        results = await streamed(asked, {"inputs": inputs(stream=True), "request_id": "a"})
        assert [text_of(r) for r in results["a"]] == ["A"]
        assert "a device is gone" in str(results["error"][0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([tensor("stream", True)], "no input text_input"),
        (inputs(unknown="x"), "no input unknown"),
        (inputs(stream="x"), "must be of type BOOL"),
        (inputs(sampling_parameters="{"), "sampling_parameters"),
        (inputs(sampling_parameters="[]"), "must be a JSON object"),
        (inputs(sampling_parameters='{"best_of": 2}'), "best_of"),
        (inputs(sampling_parameters='{"top_k": "many"}'), "top_k"),
        (inputs(text=""), "prompt is empty"),
    ],
)
async def test_what_cannot_be_served(given, words):
    async with client(TextEngine()) as asked:
        with pytest.raises(InferenceServerException, match=words) as caught:
            await asked.infer("scripted", given)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


async def test_more_than_one_text():
    async with client(TextEngine()) as asked:
        given = triton.InferInput("text_input", [2], "BYTES")
        given.set_data_from_numpy(np.array([b"a", b"b"], object))
        with pytest.raises(InferenceServerException, match="one value"):
            await asked.infer("scripted", [given])
        with pytest.raises(InferenceServerException, match="serves scripted") as caught:
            await asked.infer("other", inputs())
        assert caught.value.status() == str(grpc.StatusCode.NOT_FOUND)
