"""Measures a running server from outside: requests sent at a given concurrency or rate, and when their tokens came."""

import asyncio
import hashlib
import io
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import SglangSchedulerStub

from mimo_jax.evaluation.prompts import load
from mimo_jax.stats import DecodeStats
from mimo_jax.tokenizer import Tokenizer
from serve.channel import key_metadata, open_channel


@dataclass(frozen=True)
class Question:
    """A prompt to send."""

    scenario: str
    ids: Sequence[int]


def asked_by_turns(tokenizer: Tokenizer, scenarios: Sequence[str], count: int) -> list[Question]:
    """The frozen prompts of the scenarios by turns, and again from the beginning where they are too few."""
    asked = {name: [Question(name, tokenizer.encode_chat(p.messages)) for p in load(name)] for name in scenarios}
    by_turns = [question for some in zip(*asked.values(), strict=True) for question in some]
    return list(islice(cycle(by_turns), count))


@dataclass(frozen=True)
class Ask:
    """What every request asks for."""

    max_new_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = False
    seed: int = 0


@dataclass
class Answer:
    """What became of one request. Times are seconds on the client's clock."""

    scenario: str
    begun: float
    """When it was to be sent."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When a message came, and its tokens: the prefill's first, then one message a round."""
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    reason: str = ""
    error: str = ""
    """Status and message, if it failed."""
    token_ids: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """In the output."""
        return sum(count for _, count in self.arrivals)

    @property
    def time_to_first_token(self) -> float:
        """Seconds."""
        return self.arrivals[0][0] - self.begun

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds a token after the first; None if there was no other."""
        later = self.tokens - self.arrivals[0][1]
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None

    def gaps(self) -> list[tuple[float, int]]:
        """Seconds a token and the tokens, of every message after the first: its tokens share the time since."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [((now - before) / count, count) for (before, _), (now, count) in pairs]

    def decoding(self, verify_length: int) -> DecodeStats:
        """Rounds, as far as messages tell.

        A message is a round, which gave one token more than it accepted. The last round may have been cut; what it
        accepted is what the server's own total leaves for it.
        """
        stats = DecodeStats(self.prompt_tokens, new_tokens=self.arrivals[0][1])
        counts = [count for _, count in self.arrivals[1:]]
        for i, count in enumerate(counts):
            before = sum(counts[:i]) - i
            accepted = self.accepted - before if i == len(counts) - 1 else count - 1
            stats.add_round(accepted, count, verify_length)
        return stats


class Server:
    """A running server as its clients see it; made by `connected`."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]]) -> None:
        self._stub: Any = SglangSchedulerStub(channel)
        self._metadata = metadata

    async def describe(self) -> dict[str, Any]:
        """Its model, version and settings, for the record."""
        model = await self._stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=self._metadata)
        server = await self._stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=self._metadata)
        return {
            "model": model.served_model_name,
            "version": server.sglang_version,
            "context_length": model.max_context_length,
            "settings": dict(server.server_args.items()),
        }

    async def tokenizer(self) -> Tokenizer:
        """The one it hands out; raises `ValueError` if it came damaged."""
        parts, digest = [], ""
        call = self._stub.GetTokenizer(common_pb2.GetTokenizerRequest(), metadata=self._metadata)
        async for chunk in call:
            parts.append(chunk.data)
            digest = chunk.sha256
        data = b"".join(parts)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError("the server's tokenizer came damaged: its SHA-256 is another")
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():  # flat names only, so that nothing is written elsewhere
                (Path(folder) / Path(name).name).write_bytes(archive.read(name))
            return Tokenizer.from_folder(folder)

    async def flush_cache(self) -> None:
        """Forget cached prefixes; raises `ValueError` if others' requests are inside."""
        done = await self._stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=10), metadata=self._metadata)
        if not done.success:
            raise ValueError(f"the server did not flush its cache: {done.message}")

    async def ask(self, question: Question, ask: Ask, request_id: str, begun: float) -> Answer:
        """Send one request and take its answer; one that fails says so itself."""
        answer = Answer(question.scenario, begun)
        sampling = pb.SamplingParams(
            temperature=ask.temperature,
            top_p=1,
            top_k=-1,
            repetition_penalty=1,
            max_new_tokens=ask.max_new_tokens,
            n=1,
            ignore_eos=ask.ignore_eos,
            stream_interval=1,
        )
        sampling.custom_params.update({"seed": ask.seed})
        request = pb.GenerateRequest(
            request_id=request_id,
            tokenized=pb.TokenizedInput(input_ids=question.ids),
            sampling_params=sampling,
            stream=True,
        )
        try:
            async for response in self._stub.Generate(request, metadata=self._metadata):
                if response.HasField("chunk"):
                    answer.arrivals.append((time.perf_counter(), len(response.chunk.token_ids)))
                    answer.token_ids += response.chunk.token_ids
                else:
                    _complete(answer, response.complete)
        except grpc.aio.AioRpcError as error:
            answer.error = f"{error.code().name}: {error.details()}"
        answer.ended = time.perf_counter()
        if not answer.error and not answer.arrivals:
            answer.error = f"no tokens came (finish reason {answer.reason or 'missing'})"
        return answer


def _complete(answer: Answer, complete: Any) -> None:
    answer.prompt_tokens, answer.cached_tokens = complete.prompt_tokens, complete.cached_tokens
    answer.drafted, answer.accepted = complete.spec_draft_tokens, complete.spec_accepted_tokens
    answer.reason = complete.finish_reason
    if complete.finish_reason in ("abort", "error"):
        answer.error = f"finish reason {complete.finish_reason}"


@asynccontextmanager
async def connected(
    address: str, *, api_key: str | None, ca_file: Path | None, timeout: float
) -> AsyncIterator[Server]:
    """A server that is there; over TLS if a file of its authorities is given.

    Raises:
        OSError: Nobody listens there.
    """
    channel = open_channel(grpc.aio, address, ca_file)
    async with channel:
        try:
            await asyncio.wait_for(channel.channel_ready(), timeout)
        except TimeoutError:
            raise OSError(f"no gRPC server answers at {address} within {timeout:g} s") from None
        yield Server(channel, key_metadata(api_key))


async def run(
    server: Server,
    questions: Sequence[Question],
    ask: Ask,
    *,
    concurrency: int | None,
    rate: float | None,
    seed: int,
    name: str,
    progress: Callable[[int], None],
) -> tuple[list[Answer], float]:
    """Send all questions; their answers in the same order, and the seconds from the first to the last.

    Args:
        server: Asked.
        questions: One a request.
        ask: What every request asks for; the i-th adds i to the seed.
        concurrency: Requests in flight at most.
        rate: Mean requests a second, arriving as a Poisson process; None: as soon as concurrency allows.
        seed: Of the arrivals.
        name: Begins every request's id; unique among the server's clients.
        progress: Told of every request that is done.
    """
    waits = np.random.default_rng(seed).exponential(1 / rate, len(questions)) if rate else np.zeros(len(questions))
    begin = time.perf_counter()
    gate = asyncio.Semaphore(concurrency or len(questions))

    async def one(i: int, at: float) -> Answer:
        await asyncio.sleep(at - time.perf_counter())
        async with gate:
            # at a rate a request is late from the moment it should have gone out; without one it never is
            begun = at if rate else time.perf_counter()
            mine = replace(ask, seed=ask.seed + i)
            answer = await server.ask(questions[i], mine, f"{name}-{i}", begun)
        progress(1)
        return answer

    tasks = [asyncio.create_task(one(i, begin + float(at))) for i, at in enumerate(np.cumsum(waits))]
    answers = await asyncio.gather(*tasks)
    return answers, max(a.ended for a in answers) - begin
