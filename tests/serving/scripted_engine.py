"""An engine without a model, to test services: it answers every prompt with a script."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from serve.generation import (
    DuplicateRequest,
    EngineInfo,
    Event,
    Finished,
    GenerationRequest,
    InvalidRequest,
    Load,
    NotServing,
    QueueFull,
    Refused,
    RoundTokens,
    Status,
    TokenLogprobs,
    Usage,
)

Script = Callable[[GenerationRequest, int], Sequence[Sequence[int]]]


def echo(request: GenerationRequest, index: int) -> Sequence[Sequence[int]]:
    """The prompt again, one token in the first round and up to three in every other."""
    ids = list(request.prompt_ids)
    return [ids[:1], *(ids[i : i + 3] for i in range(1, len(ids), 3))]


class ScriptedEngine:
    """Gives `script`'s rounds one after another, `seconds` apart; keeps to limits, stop ids, aborts and deadlines."""

    def __init__(self, script: Script = echo, seconds: float = 0.0, **info: Any) -> None:
        defaults: dict[str, Any] = {
            "model": "scripted",
            "vocab_size": 512,
            "eos_ids": (0,),
            "context_length": 4096,
            "max_running": 8,
            "max_queued": 16,
            "page_size": 64,
            "block_size": 8,
        }
        self.info = EngineInfo(**{**defaults, **info})
        self.status = Status.READY
        self.script, self.seconds = script, seconds
        self.seen: list[GenerationRequest] = []
        self.live: dict[str, str | None] = {}
        """Requests inside; the message once one is aborted."""
        self.aborted: list[tuple[str, str]] = []
        self.profiling: str | None = None
        self.flushed = 0

    def load(self) -> Load:
        return Load(running=len(self.live), slots=self.info.max_running, total_tokens=1 << 16, total_snapshots=4)

    def submit(self, request: GenerationRequest) -> AsyncIterator[Event]:
        if self.status is not Status.READY:
            raise NotServing(f"the server is {self.status.value}")
        if request.request_id in self.live:
            raise DuplicateRequest(f"request {request.request_id} is still being answered")
        if len(self.live) >= self.info.max_running + self.info.max_queued:
            raise QueueFull("too many requests wait", 1.5)
        if len(request.prompt_ids) + request.sampling.max_new_tokens > self.info.context_length:
            raise InvalidRequest("prompt and max_new_tokens do not fit the context")
        self.seen.append(request)
        self.live[request.request_id] = None
        return self._run(request)

    async def _run(self, request: GenerationRequest) -> AsyncIterator[Event]:
        try:
            for index in range(request.n):
                async for event in self._sample(request, index):
                    yield event
        finally:
            del self.live[request.request_id]

    async def _sample(self, request: GenerationRequest, index: int) -> AsyncIterator[Event]:
        sampling, given, rounds, accepted, drafted = request.sampling, 0, 0, 0, 0
        stops = sampling.stops(self.info.eos_ids)

        def finished(reason: Any, matched: int | None = None, message: str = "") -> Finished:
            usage = Usage(len(request.prompt_ids), 0, given, rounds, drafted, accepted)
            return Finished(index, reason, usage, matched, message)

        for number, tokens in enumerate(self.script(request, index)):
            await asyncio.sleep(self.seconds)
            if (message := self.live[request.request_id]) is not None:
                yield finished("abort", message=message)
                return
            if request.deadline is not None and time.monotonic() > request.deadline:
                yield finished("deadline")
                return
            kept = list(tokens)[: sampling.max_new_tokens - given]
            at = next((i for i, t in enumerate(kept) if t in stops), None)
            kept = kept if at is None else kept[: at + 1]
            given += len(kept)
            if number:
                rounds, drafted, accepted = rounds + 1, drafted + 7, accepted + len(kept) - 1
            known = [TokenLogprobs(-0.5, [(t, -0.5)] * request.top_logprobs) for t in kept] if request.logprobs else ()
            yield RoundTokens(index, kept, 7 if number else 0, len(kept) - 1 if number else 0, known)
            if at is not None:
                yield finished("stop", kept[at])
                return
            if given >= sampling.max_new_tokens:
                break
        yield finished("length")

    def abort(self, request_id: str, message: str = "") -> bool:
        if self.live.get(request_id, "gone") is not None:
            return False
        self.live[request_id] = message
        self.aborted.append((request_id, message))
        return True

    async def flush_cache(self) -> bool:
        self.flushed += not self.live
        return not self.live

    async def drain(self, seconds: float) -> bool:
        self.status = Status.DRAINING
        until = time.monotonic() + seconds
        while self.live and time.monotonic() < until:
            await asyncio.sleep(0.01)
        clean = not self.live
        for request_id in list(self.live):
            self.abort(request_id, "the server is stopping")
        while self.live:
            await asyncio.sleep(0.01)
        self.status = Status.STOPPED
        return clean

    def start_profile(self, folder: str | None = None) -> str:
        if self.profiling:
            raise Refused("a profile is being recorded")
        self.profiling = folder or "profile"
        return self.profiling

    def stop_profile(self) -> None:
        if not self.profiling:
            raise Refused("no profile is being recorded")
        self.profiling = None
