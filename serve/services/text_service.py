"""Our own gRPC service, `mimo.serve.v1.Generation`: text in, text out, one message a round."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

from google.protobuf.struct_pb2 import Struct
from grpc.aio import ServicerContext

from serve.generation import MAX_TOP_LOGPROBS, InvalidRequest, Status
from serve.protos.mimo.serve.v1 import generation_pb2 as pb
from serve.protos.mimo.serve.v1.generation_pb2_grpc import GenerationServicer
from serve.services.answering import Answering, whole
from serve.services.limits import MAX_SAMPLES
from serve.services.status import statuses
from serve.services.text_request import CONSTRAINTS, read_chat, read_text
from serve.text.reasoning import OPEN as THINK
from serve.text.tool_calls import OPEN as TOOL_CALL

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Generation"].full_name
ADMIN_METHODS = frozenset(f"/{SERVICE_NAME}/{name}" for name in ("FlushCache", "Drain"))
"""Methods for those who run the server."""

_SHORTEST_INTERVAL = 0.1
_DRAIN_SECONDS = 60.0

_STATUSES = {
    Status.STARTING: pb.STATUS_STARTING,
    Status.READY: pb.STATUS_READY,
    Status.DRAINING: pb.STATUS_DRAINING,
    Status.STALLED: pb.STATUS_STALLED,
    Status.FAILED: pb.STATUS_FAILED,
    Status.STOPPED: pb.STATUS_STOPPED,
}


class TextService(GenerationServicer):
    """The service; every method's contract stands in `generation.proto`."""

    def __init__(self, answering: Answering) -> None:
        self._answering, self._engine = answering, answering.engine

    async def Generate(self, request: pb.GenerateRequest, context: ServicerContext) -> None:
        """Answer a prompt, round by round."""
        async with statuses(context), aclosing(self._answering.answer(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    async def Complete(self, request: pb.GenerateRequest, context: ServicerContext) -> pb.CompleteResponse:
        """Answer a prompt in one message."""
        async with statuses(context), aclosing(self._answering.answer(request, context)) as responses:
            return await whole(responses)

    async def Tokenize(self, request: pb.TokenizeRequest, context: ServicerContext) -> pb.TokenizeResponse:
        """Token ids of a text or of a conversation."""
        tokenizer = self._answering.tokenizer
        async with statuses(context):
            match request.WhichOneof("input"):
                case "text":
                    ids = await asyncio.to_thread(read_text, request.text, tokenizer)
                case "chat":
                    ids = await asyncio.to_thread(read_chat, request.chat, tokenizer)
                case _:
                    raise InvalidRequest("there is nothing to tokenize: give text or chat")
            return pb.TokenizeResponse(ids=ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: ServicerContext) -> pb.DetokenizeResponse:
        """Text of token ids."""
        decode = self._answering.tokenizer.decode
        text = await asyncio.to_thread(decode, list(request.ids), skip_special=not request.keep_special)
        return pb.DetokenizeResponse(text=text)

    async def Abort(self, request: pb.AbortRequest, context: ServicerContext) -> pb.AbortResponse:
        """End a request."""
        return pb.AbortResponse(aborted=self._answering.requests.abort(request.request_id, request.message))

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: ServicerContext
    ) -> pb.GetServerInfoResponse:
        """What is served, how, and what it can do."""
        async with statuses(context):
            return self._info()

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: ServicerContext) -> None:
        """How busy the server is, again and again."""
        interval = request.interval_seconds if request.HasField("interval_seconds") else 1.0
        async with statuses(context):
            if not interval >= _SHORTEST_INTERVAL:
                raise InvalidRequest(f"interval_seconds must be at least {_SHORTEST_INTERVAL}, not {interval:g}")
            async for message in self._loads(interval):
                await context.write(message)

    async def FlushCache(self, request: pb.FlushCacheRequest, context: ServicerContext) -> pb.FlushCacheResponse:
        """Forget cached prefixes."""
        async with statuses(context):
            return pb.FlushCacheResponse(flushed=await self._engine.flush_cache())

    async def Drain(self, request: pb.DrainRequest, context: ServicerContext) -> pb.DrainResponse:
        """Refuse new requests and wait for those inside."""
        seconds = request.timeout_seconds if request.HasField("timeout_seconds") else _DRAIN_SECONDS
        async with statuses(context):
            if not seconds >= 0:
                raise InvalidRequest(f"timeout_seconds must be 0 or more, not {seconds:g}")
            return pb.DrainResponse(clean=await self._engine.drain(seconds))

    async def _loads(self, interval: float) -> AsyncIterator[pb.WatchLoadResponse]:
        while True:
            status, load = self._engine.status, self._engine.load()
            yield pb.WatchLoadResponse(
                status=_STATUSES[status],
                running=load.running,
                waiting=load.waiting,
                slots=load.slots,
                used_tokens=load.used_tokens,
                total_tokens=load.total_tokens,
                cached_tokens=load.cached_tokens,
                snapshots=load.snapshots,
                total_snapshots=load.total_snapshots,
            )
            if status in (Status.STOPPED, Status.FAILED):
                return
            until = time.monotonic() + interval
            while (left := until - time.monotonic()) > 0 and self._engine.status is status:
                await asyncio.sleep(min(left, _SHORTEST_INTERVAL))

    def _info(self) -> pb.GetServerInfoResponse:
        info, answering = self._engine.info, self._answering
        capabilities = pb.Capabilities(
            constraints=CONSTRAINTS if answering.requests.compiler else (),
            max_n=MAX_SAMPLES,
            max_top_logprobs=MAX_TOP_LOGPROBS,
            reasoning=answering.tokenizer.token_id(THINK) is not None,
            tools=answering.tokenizer.token_id(TOOL_CALL) is not None,
        )
        return pb.GetServerInfoResponse(
            model=info.model,
            architecture=info.architecture,
            version=version("mimo-jax"),
            status=_STATUSES[self._engine.status],
            vocab_size=info.vocab_size,
            eos_ids=info.eos_ids,
            context_length=info.context_length,
            max_running=info.max_running,
            max_queued=info.max_queued,
            page_size=info.page_size,
            block_size=info.block_size,
            capabilities=capabilities,
            default_sampling=self._default_sampling(),
            settings=_struct(info.settings),
        )

    def _default_sampling(self) -> pb.Sampling:
        """All that does not depend on the request."""
        defaults = self._answering.defaults
        return pb.Sampling(
            temperature=defaults.temperature,
            top_p=defaults.top_p,
            top_k=defaults.top_k,
            min_p=defaults.min_p,
            repetition_penalty=defaults.repetition_penalty,
            presence_penalty=defaults.presence_penalty,
            frequency_penalty=defaults.frequency_penalty,
            logit_bias=dict(defaults.logit_bias),
            stop=defaults.stop,
            stop_token_ids=defaults.stop_token_ids,
            ignore_eos=defaults.ignore_eos,
        )


def _struct(settings: dict[str, Any]) -> Struct:
    """Settings as plain JSON values; what is none is shown as people would read it."""
    struct = Struct()
    struct.update(json.loads(json.dumps(settings, default=str)))
    return struct
