"""A request's way through the server, whichever service it came through: read, traced, logged, aborted."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import cast

from grpc.aio import ServicerContext

from serve.generation import DuplicateRequest, Engine, Event, Finished, GenerationRequest, InvalidRequest
from serve.logs import RequestLog, about
from serve.services.constraints import Compiler
from serve.services.limits import deadline
from serve.tracing import RequestTrace, Tracer


class Requests:
    """All requests of one engine, those included that it does not know yet.

    Args:
        engine: Answers.
        compiler: Makes constraints; None: there can be none.
        seed: Of the server, for requests that bring none.
        max_seconds: A request may take; None: as long as it likes.
        log: Told of requests.
        tracer: Follows requests; None: nobody does.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        compiler: Compiler | None = None,
        seed: int = 0,
        max_seconds: float | None = None,
        log: RequestLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.engine, self.compiler, self.seed = engine, compiler, seed
        self._max_seconds, self._log, self._tracer = max_seconds, log or RequestLog(), tracer
        self._reading: dict[str, str | None] = {}
        """Requests that are not in the engine yet; why, once one is aborted."""

    async def events(
        self, request_id: str, context: ServicerContext, read: Callable[[float | None], GenerationRequest]
    ) -> AsyncGenerator[Event, None]:
        """What the engine says to a request. Closing it aborts what is left.

        Args:
            request_id: Of the request.
            context: Of the call.
            read: Makes the request, given its deadline; called in a thread, as it may take a while.

        Raises:
            Refused: It cannot be served.
            EngineFailed: The engine died.
            TimeoutError: The deadline passed.
        """
        begun, tokens = time.monotonic(), defaultdict[int, list[int]](list)
        with self._traced(request_id, context) as trace:
            stream = await self._submitted(request_id, deadline(context, self._max_seconds), read, trace)
            async with aclosing(cast(AsyncGenerator[Event, None], stream)) as events:
                async for event in events:
                    if not isinstance(event, Finished):
                        tokens[event.index] += event.token_ids
                    else:
                        seconds = time.monotonic() - begun
                        self._log.finished(request_id, event, seconds, tokens.pop(event.index, []))
                        if event.reason == "deadline":
                            raise TimeoutError("the request took longer than it may")
                    yield event

    def abort(self, request_id: str, message: str = "") -> bool:
        """End a request (see `serve.generation.Engine`), also one that the engine has not been given yet."""
        if request_id not in self._reading:
            return self.engine.abort(request_id, message)
        if self._reading[request_id] is not None:
            return False
        self._reading[request_id] = message
        return True

    async def _submitted(
        self,
        request_id: str,
        until: float | None,
        read: Callable[[float | None], GenerationRequest],
        trace: RequestTrace | None,
    ) -> AsyncIterator[Event]:
        if not request_id:
            raise InvalidRequest("request_id is empty: every request needs one of its own")
        if request_id in self._reading:
            raise DuplicateRequest(f"request {request_id!r} is still being read; ids must be unique")
        self._reading[request_id] = None
        try:
            with about(request_id):
                request = await asyncio.to_thread(read, until)
            if trace is not None:
                trace.read(len(request.prompt_ids))
            stream = self.engine.submit(replace(request, trace=trace))
        finally:
            aborted = self._reading.pop(request_id)
        self._log.received(request)
        if aborted is not None:
            self.engine.abort(request_id, aborted)
        return stream

    @contextmanager
    def _traced(self, request_id: str, context: ServicerContext) -> Iterator[RequestTrace | None]:
        """The trace of a request, if somebody wants one; closed at the end, with the error if there was one."""
        if self._tracer is None:
            yield None
            return
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        trace = self._tracer.request(request_id, metadata)
        try:
            yield trace
        except BaseException as error:
            gone = isinstance(error, asyncio.CancelledError | GeneratorExit)
            trace.close("the client went away" if gone else str(error) or type(error).__name__)
            raise
        trace.close()
