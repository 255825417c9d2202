"""A text service over a scripted engine, in the test's own event loop, and what tests ask of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc

from mimo_jax.byte_tokenizer import write_byte_tokenizer
from mimo_jax.request import SamplingParams
from mimo_jax.tokenizer import StopStrings, StreamDecoder, Tokenizer
from serve.generation import Event, Finished, GenerationRequest, Usage
from serve.protos.mimo.serve.v1 import generation_pb2 as pb
from serve.protos.mimo.serve.v1.generation_pb2_grpc import GenerationStub, add_GenerationServicer_to_server
from serve.services.answering import Answering
from serve.services.requests import Requests
from serve.services.text_service import TextService
from tests.serving.scripted_engine import Script, ScriptedEngine

VOCABULARY = 400
LESSONS = ["The quick brown fox jumps over the lazy dog. ", "naïve café, 東京タワー, 🙂🙃 and 12345 numbers\n"] * 20


@cache
def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are bytes, then come merges and the added tokens."""
    with TemporaryDirectory() as folder:
        write_byte_tokenizer(folder, VOCABULARY, LESSONS)
        return Tokenizer.from_folder(Path(folder))


class TextEngine(ScriptedEngine):
    """A scripted engine that ends samples at stop strings, too, as the real one does."""

    def __init__(self, *args: Any, **info: Any) -> None:
        defaults = {"vocab_size": 512, "eos_ids": byte_tokenizer().eos_ids}
        super().__init__(*args, **{**defaults, **info})

    async def _sample(self, request: GenerationRequest, index: int) -> AsyncIterator[Event]:
        stops, decoder = StopStrings(request.sampling.stop), StreamDecoder(byte_tokenizer())
        given = 0
        async for event in super()._sample(request, index):
            if isinstance(event, Finished):
                yield event
                return
            for i, token in enumerate(event.token_ids):
                stops.push(decoder.push(token))
                if stops.stopped:
                    yield replace(event, token_ids=event.token_ids[: i + 1], logprobs=event.logprobs[: i + 1])
                    usage = Usage(len(request.prompt_ids), completion_tokens=given + i + 1)
                    yield Finished(index, "stop", usage, stops.matched)
                    return
            given += len(event.token_ids)
            yield event


def says(text: str, size: int = 3, end: bool = True) -> Script:
    """A script that writes a text in rounds of `size` tokens, whatever the prompt."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text) + ([tokenizer.eos_ids[0]] if end else [])
    return lambda request, index: [ids[i : i + size] for i in range(0, len(ids), size)]


@dataclass
class Served:
    """A running server."""

    engine: ScriptedEngine
    stub: Any
    channel: grpc.aio.Channel
    address: str

    async def stream(self, **request: Any) -> list[pb.GenerateResponse]:
        return [response async for response in self.stub.Generate(pb.GenerateRequest(**request))]

    async def settle(self) -> None:
        """Wait until nothing is in the engine."""
        async with asyncio.timeout(5):
            while self.engine.live:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(
    engine: ScriptedEngine, defaults: SamplingParams | None = None, stream_interval: int = 1, **requests: Any
) -> AsyncIterator[Served]:
    """A server on a free port."""
    server = grpc.aio.server()
    answering = Answering(Requests(engine, **requests), byte_tokenizer(), defaults, stream_interval=stream_interval)
    add_GenerationServicer_to_server(TextService(answering), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Served(engine, GenerationStub(channel), channel, address)
    finally:
        await server.stop(0.2)
