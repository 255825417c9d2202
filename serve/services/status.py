"""What an error of the engine is called in gRPC."""

import logging

import grpc
from grpc.aio import ServicerContext

from serve.generation import (
    DuplicateRequest,
    EngineFailed,
    InvalidRequest,
    NotFound,
    NotServing,
    QueueFull,
    Refused,
    Unsupported,
)

logger = logging.getLogger(__name__)

_CODES: dict[type[Refused], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    DuplicateRequest: grpc.StatusCode.ALREADY_EXISTS,
    NotServing: grpc.StatusCode.UNAVAILABLE,
    NotFound: grpc.StatusCode.NOT_FOUND,
}


_MOST = 500
"""Characters of a message: gRPC takes 8 KiB of trailers, and writes one character as up to twelve."""


class statuses:
    """Ends a call with the status of a refusal or a failure that is raised inside."""

    def __init__(self, context: ServicerContext) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, BaseExceptionGroup):  # of a task group, whose first error ends the call
            error = error.exceptions[0]
        match error:
            case QueueFull():
                pushback = ("grpc-retry-pushback-ms", str(round(error.retry_after * 1000)))
                await self._end(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), pushback)
            case Refused():
                code = _CODES.get(type(error), grpc.StatusCode.FAILED_PRECONDITION)
                await self._end(code, str(error))
            case EngineFailed():
                await self._end(grpc.StatusCode.INTERNAL, f"the engine failed: {error}")
            case TimeoutError():
                await self._end(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
            case grpc.aio.AbortError():
                raise error  # the call has its status
            case Exception():
                logger.exception("a call failed")
                await self._end(grpc.StatusCode.INTERNAL, f"a fault of the server: {type(error).__name__}")

    async def _end(self, code: grpc.StatusCode, message: str, *trailers: tuple[str, str]) -> None:
        # what a client gave may be quoted in full
        message = message if len(message) <= _MOST else f"{message[: _MOST - 1]}…"
        await self._context.abort(code, message, trailers)
