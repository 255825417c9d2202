"""What an error of the engine is called in gRPC."""

import logging

import grpc
from grpc.aio import ServicerContext

from serve.generation import (
    DuplicateRequest,
    EngineFailed,
    InvalidRequest,
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
}


class statuses:
    """Ends a call with the status of a refusal or a failure that is raised inside."""

    def __init__(self, context: ServicerContext) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        match error:
            case QueueFull():
                pushback = ("grpc-retry-pushback-ms", str(round(error.retry_after * 1000)))
                await self._context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), (pushback,))
            case Refused():
                code = _CODES.get(type(error), grpc.StatusCode.FAILED_PRECONDITION)
                await self._context.abort(code, str(error))
            case EngineFailed():
                await self._context.abort(grpc.StatusCode.INTERNAL, f"the engine failed: {error}")
            case TimeoutError():
                await self._context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
            case grpc.aio.AbortError():
                pass  # the call has its status
            case Exception():
                logger.exception("a call failed")
                await self._context.abort(grpc.StatusCode.INTERNAL, f"a fault of the server: {type(error).__name__}")
