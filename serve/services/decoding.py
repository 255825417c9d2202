"""Bytes that are no message are the caller's mistake, and are answered as one."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import ServicerContext


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Has requests decoded where a status can still be chosen: gRPC itself calls what it cannot decode UNKNOWN."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, given bytes and decoding them itself."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        name, decode = handler_call_details.method, handler.request_deserializer
        kinds = ("unary", "stream")
        kind = f"{kinds[handler.request_streaming]}_{kinds[handler.response_streaming]}"
        method = getattr(handler, kind)

        async def message(data: bytes, context: ServicerContext) -> Any:
            try:
                return decode(data)
            except DecodeError as error:
                words = f"{len(data)} bytes are no request of {name}: {error}"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, words)

        async def messages(stream: AsyncIterator[bytes], context: ServicerContext) -> AsyncIterator[Any]:
            async for data in stream:
                yield await message(data, context)

        async def call(given: Any, context: ServicerContext) -> Any:
            request = messages(given, context) if handler.request_streaming else await message(given, context)
            answer = method(request, context)
            if not inspect.isasyncgen(answer):
                return await answer
            async with aclosing(answer):
                async for response in answer:
                    await context.write(response)

        return handler._replace(request_deserializer=None, **{kind: call})
