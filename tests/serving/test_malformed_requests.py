"""Requests that are nearly right, far off, or no messages at all: each gets a status, and the server goes on."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from smg_grpc_proto.generated import sglang_scheduler_pb2
from tritonclient.grpc import service_pb2

from serve.generation import InvalidRequest
from serve.protos.mimo.serve.v1 import generation_pb2
from serve.services import kserve_service, scheduler_service, text_service
from serve.services.requests import Requests
from tests.serving.all_services import all_services
from tests.serving.text_server import TextEngine

SCHEDULER, TEXT = f"/{scheduler_service.SERVICE_NAME}/", f"/{text_service.SERVICE_NAME}/"
KSERVE = f"/{kserve_service.SERVICE_NAME}/"
ANSWERS = {
    "OK",
    "INVALID_ARGUMENT",
    "UNIMPLEMENTED",
    "ALREADY_EXISTS",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "DEADLINE_EXCEEDED",
}
"""What a request may end with that asks for nonsense; that a server is at fault is not among them."""
F = FieldDescriptor
STRINGS = ["", "a", "1", "\0", "{", "[", '{"temperature": 1e999}', "é" * 2000, "\U0001f600" * 100, "scripted"]
INTEGERS = [0, 1, 2, 5, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1]
FLOATS = [0.0, 0.5, 1.0, -1.0, 1e30, -1e30, float("nan"), float("inf"), 1e-30]
BOUNDS = {
    F.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    F.CPPTYPE_UINT32: (0, 2**32 - 1),
    F.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    F.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class Compiler:
    """Nothing can be constrained so."""

    def compile(self, kind: str, text: str) -> Any:
        raise InvalidRequest(f"{kind}: bad grammar")


def served(engine: TextEngine) -> Any:
    return all_services(Requests(engine, compiler=Compiler(), max_seconds=20))


def change(rng: random.Random, message: Message) -> None:
    """Give one field, somewhere in a message, another value: at its edges or beyond what it is for."""
    field: Any = rng.choice(message.DESCRIPTOR.fields)
    if field.is_repeated:
        values, entry = getattr(message, field.name), field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            key, value = (entry.fields_by_name[name] for name in ("key", "value"))
            if value.cpp_type == F.CPPTYPE_MESSAGE:
                change(rng, values[odd(rng, key)])
            else:
                values[odd(rng, key)] = odd(rng, value)
        elif values and rng.random() < 0.3:
            del values[rng.randrange(len(values))]
        elif entry is not None:
            change(rng, rng.choice(values) if values and rng.random() < 0.7 else values.add())
        else:
            values.extend(odd(rng, field) for _ in range(rng.choice([1, 1, 2, 40])))
    elif field.cpp_type == F.CPPTYPE_MESSAGE:
        if field.message_type.fields:
            change(rng, getattr(message, field.name))
        else:
            getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, odd(rng, field))


def odd(rng: random.Random, field: Any) -> Any:
    """A value that a field's type has room for."""
    match field.cpp_type:
        case F.CPPTYPE_STRING:
            text = rng.choice(STRINGS)
            return text.encode() + rng.randbytes(rng.randrange(3)) if field.type == F.TYPE_BYTES else text
        case F.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case F.CPPTYPE_FLOAT | F.CPPTYPE_DOUBLE:
            return rng.choice(FLOATS)
        case F.CPPTYPE_ENUM:
            return rng.choice(field.enum_type.values).number
        case kind:
            low, high = BOUNDS[kind]
            return rng.choice([i for i in INTEGERS if low <= i <= high])


def mangled(rng: random.Random, message: Message) -> bytes:
    """A message with some fields changed, then perhaps some bytes of it; or bytes of no message."""
    for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
        change(rng, message)
    data = bytearray(message.SerializeToString())
    match rng.randrange(5):
        case 0 if data:
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 1:
            data = bytearray(rng.randbytes(rng.randrange(60)))
    return bytes(data)


def scheduler_request(number: int) -> Message:
    pb = sglang_scheduler_pb2
    return pb.GenerateRequest(
        request_id=f"s{number}",
        tokenized=pb.TokenizedInput(input_ids=[1, 2, 3]),
        sampling_params=pb.SamplingParams(max_new_tokens=4),
        stream=bool(number % 2),
    )


def text_request(number: int) -> Message:
    pb = generation_pb2
    prompts: list[dict[str, Any]] = [
        {"text": pb.Text(text="Hello")},
        {"token_ids": pb.TokenIds(ids=[1, 2, 3])},
        {"chat": pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")], tools=[pb.Tool(name="f")])},
    ]
    return pb.GenerateRequest(request_id=f"t{number}", sampling=pb.Sampling(max_new_tokens=4), **prompts[number % 3])


def tokenize_request(number: int) -> Message:
    return generation_pb2.TokenizeRequest(text=generation_pb2.Text(text="Hello"))


def detokenize_request(number: int) -> Message:
    return generation_pb2.DetokenizeRequest(ids=[1, 2, 3])


def abort_request(number: int) -> Message:
    return generation_pb2.AbortRequest(request_id=f"t{number - 1}")


def infer_request(number: int) -> Message:
    request: Any = service_pb2.ModelInferRequest  # pyright: ignore[reportAttributeAccessIssue]
    made = request(model_name="scripted", id=str(number))
    made.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"Hello")
    if number % 2:
        settings = made.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
        settings.contents.bytes_contents.append(b'{"max_new_tokens": 4}')
    return made


def health_request(number: int) -> Message:
    return health_pb2.HealthCheckRequest(service="")


Method = tuple[str, str, Callable[[int], Message]]
GENERATING: list[Method] = [
    ("unary_stream", SCHEDULER + "Generate", scheduler_request),
    ("unary_stream", TEXT + "Generate", text_request),
    ("unary_unary", TEXT + "Complete", text_request),
    ("unary_unary", KSERVE + "ModelInfer", infer_request),
    ("stream_stream", KSERVE + "ModelStreamInfer", infer_request),
]
OTHERS: list[Method] = [
    ("unary_unary", TEXT + "Tokenize", tokenize_request),
    ("unary_unary", TEXT + "Detokenize", detokenize_request),
    ("unary_unary", TEXT + "Abort", abort_request),
    ("unary_unary", "/grpc.health.v1.Health/Check", health_request),
]


async def status(channel: grpc.aio.Channel, method: Method, data: bytes) -> str:
    """How a call with these bytes ends."""
    kind, name, _ = method
    call = getattr(channel, kind)(name)([data] if kind == "stream_stream" else data)
    try:
        async with asyncio.timeout(30):
            if kind == "unary_unary":
                await call
            else:
                async for _ in call:
                    pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_thousands_of_malformed_requests_are_all_answered(seed):
    engine, rng = TextEngine(max_queued=1000), random.Random(seed)
    ends: dict[str, Counter[str]] = {name: Counter() for _, name, _ in GENERATING + OTHERS}
    async with served(engine) as (_, channel):

        async def one(number: int) -> None:
            method = rng.choice(GENERATING if rng.random() < 0.85 else OTHERS)
            ends[method[1]][await status(channel, method, mangled(rng, method[2](number)))] += 1

        for start in range(0, 6000, 100):
            await asyncio.gather(*(one(start + i) for i in range(100)))
        assert sum(sum(codes.values()) for codes in ends.values()) == 6000
        for name, codes in ends.items():
            assert set(codes) <= ANSWERS, (name, codes)
            assert codes["OK"] > 10, (name, codes)
            assert codes["INVALID_ARGUMENT"] > 10, (name, codes)
        assert not engine.live
        for number, method in enumerate(GENERATING):
            assert await status(channel, method, method[2](number).SerializeToString()) == "OK"


@pytest.mark.parametrize("method", GENERATING + OTHERS, ids=lambda m: m[1])
async def test_bytes_that_are_no_message_are_the_callers_mistake(method):
    async with served(TextEngine()) as (_, channel):
        kind, name, _ = method
        data = b"\xff\xff\xff"
        call = getattr(channel, kind)(name)([data] if kind == "stream_stream" else data)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call if kind == "unary_unary" else call.read())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"3 bytes are no request of {name}" in (caught.value.details() or "")


async def test_what_this_server_does_not_have_is_unimplemented_and_nothing_is_fatal(seed):
    """Every method of every service that anybody may call, with bytes of any kind."""
    rng = random.Random(seed)
    files = (sglang_scheduler_pb2, generation_pb2, service_pb2)
    services: list[Any] = [s for file in files for s in file.DESCRIPTOR.services_by_name.values()]
    async with served(TextEngine()) as (_, channel):
        for service in services:
            for method in service.methods:
                if method.name in ("Drain", "WatchLoad"):  # the server would end, or the call would not
                    continue
                kinds = ("unary", "stream")
                kind = f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
                for size in (0, 1, 7, 40):
                    called = (kind, f"/{service.full_name}/{method.name}", health_request)
                    ended = await status(channel, called, rng.randbytes(size))
                    assert ended in ANSWERS, (called, ended)
        assert await status(channel, GENERATING[0], scheduler_request(0).SerializeToString()) == "OK"
