"""SGLang's scheduler service: token ids in, token ids out, as gateways speak it."""

import asyncio
import hashlib
import io
import time
import zipfile
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.struct_pb2 import Struct
from grpc.aio import ServicerContext
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import SglangSchedulerServicer

from serve.generation import Finished, GenerationRequest, RoundTokens, Status, TokenLogprobs
from serve.services.requests import Requests
from serve.services.scheduler_request import read_request
from serve.services.status import statuses

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SglangScheduler"].full_name
ADMIN_METHODS = frozenset(f"/{SERVICE_NAME}/{name}" for name in ("FlushCache", "StartProfile", "StopProfile"))
"""Methods for those who run the server."""
UNSUPPORTED = ("Embed", "LoadLoRAAdapter", "UnloadLoRAAdapter", "ListLoadedLoRAAdapters", "SubscribeKvEvents")
"""Methods that this server does not have."""
_CHUNK = 64 << 10
_VERSION = f"mimo-jax {version('mimo-jax')}"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
)


@dataclass
class _Sample:
    """What has been sent of one sample, and what has not."""

    ids: list[int] = field(default_factory=list)
    known: list[TokenLogprobs] = field(default_factory=list)
    sent: int = 0


class SchedulerService(SglangSchedulerServicer):
    """`sglang.grpc.scheduler.SglangScheduler` over an engine.

    Args:
        requests: Where they go.
        model: The checkpoint's folder.
        tokenizer: The folder of the tokenizer's files.
        stream_interval: Tokens that a message has at least, but for a sample's last.
    """

    def __init__(self, requests: Requests, model: Path, tokenizer: Path, *, stream_interval: int = 1) -> None:
        self._requests, self._engine = requests, requests.engine
        self._model, self._tokenizer, self._interval = model, tokenizer, stream_interval
        self._started = time.time()
        self._last_request = 0.0

    async def Generate(self, request: pb.GenerateRequest, context: ServicerContext) -> AsyncIterator[Any]:
        """Answer a prompt: deltas as they come, and a last message with everything for every sample."""
        self._last_request = time.time()
        samples: dict[int, _Sample] = {}
        interval = request.sampling_params.stream_interval or self._interval

        def read(until: float | None) -> GenerationRequest:
            return read_request(request, self._engine.info, self._requests.compiler, self._requests.seed, until)

        async with statuses(context), aclosing(self._requests.events(request.request_id, context, read)) as events:
            async for event in events:
                sample = samples.setdefault(event.index, _Sample())
                if isinstance(event, RoundTokens):
                    sample.ids += event.token_ids
                    sample.known += event.logprobs
                    if request.stream and len(sample.ids) - sample.sent >= interval:
                        yield self._chunk(request, event.index, sample)
                    continue
                if request.stream and len(sample.ids) > sample.sent:
                    yield self._chunk(request, event.index, sample)
                yield self._complete(request, event, sample)

    async def HealthCheck(self, request: Any, context: ServicerContext) -> pb.HealthCheckResponse:
        """Whether requests are taken."""
        status = self._engine.status
        return pb.HealthCheckResponse(healthy=status is Status.READY, message=status.value)

    async def Abort(self, request: pb.AbortRequest, context: ServicerContext) -> pb.AbortResponse:
        """End a request; its stream ends normally. An id that nobody knows is no error."""
        done = self._requests.abort(request.request_id, request.reason)
        message = "" if done else f"no request {request.request_id!r} is being answered"
        return pb.AbortResponse(success=done, message=message)

    async def GetModelInfo(self, request: Any, context: ServicerContext) -> pb.GetModelInfoResponse:
        """What is served."""
        async with statuses(context):
            info = self._engine.info
            return pb.GetModelInfoResponse(
                model_path=str(self._model),
                tokenizer_path=str(self._tokenizer),
                is_generation=True,
                served_model_name=info.model,
                max_context_length=info.context_length,
                max_req_input_len=info.context_length - 1,
                vocab_size=info.vocab_size,
                eos_token_ids=list(info.eos_ids),
                architectures=[info.architecture] if info.architecture else [],
                model_type="mimo_v2",
            )

    async def GetServerInfo(self, request: Any, context: ServicerContext) -> pb.GetServerInfoResponse:
        """How it is served."""
        async with statuses(context):
            info, load = self._engine.info, self._engine.load()
            response = pb.GetServerInfoResponse(
                server_args=_struct(info.settings),
                scheduler_info=_struct({"max_running_requests": info.max_running, "page_size": info.page_size}),
                active_requests=load.running + load.waiting,
                last_receive_timestamp=self._last_request,
                uptime_seconds=time.time() - self._started,
                sglang_version=_VERSION,
                server_type="grpc",
                max_total_num_tokens=load.total_tokens,
            )
            response.start_time.FromDatetime(datetime.fromtimestamp(self._started, UTC))
            return response

    async def GetLoads(self, request: pb.GetLoadsRequest, context: ServicerContext) -> pb.GetLoadsResponse:
        """How busy the engine is; it is one scheduler, whatever the number of data-parallel groups."""
        load = self._engine.load()
        usage = load.used_tokens / max(load.total_tokens, 1)
        utilization = load.running / max(load.slots, 1)
        one = pb.SchedulerLoad(
            num_running_reqs=load.running,
            num_waiting_reqs=load.waiting,
            num_total_reqs=load.running + load.waiting,
            num_used_tokens=load.used_tokens,
            max_total_num_tokens=load.total_tokens,
            token_usage=usage,
            utilization=utilization,
            max_running_requests=load.slots,
        )
        total = pb.AggregateMetrics(
            total_running_reqs=load.running,
            total_waiting_reqs=load.waiting,
            total_reqs=load.running + load.waiting,
            avg_token_usage=usage,
            avg_utilization=utilization,
        )
        stamp = datetime.now(UTC).isoformat()
        return pb.GetLoadsResponse(timestamp=stamp, version=_VERSION, dp_rank_count=1, loads=[one], aggregate=total)

    async def FlushCache(self, request: Any, context: ServicerContext) -> common_pb2.FlushCacheResponse:
        """Forget cached prefixes, once nobody is inside."""
        async with statuses(context):
            until = time.monotonic() + request.timeout_s
            while not (done := await self._engine.flush_cache()) and time.monotonic() < until:
                await asyncio.sleep(0.05)
            return common_pb2.FlushCacheResponse(success=done, message="" if done else "requests are being answered")

    async def StartProfile(self, request: Any, context: ServicerContext) -> common_pb2.ProfileResponse:
        """Begin to record what the devices do."""
        async with statuses(context):
            folder = self._engine.start_profile(request.output_dir or None)
            return common_pb2.ProfileResponse(success=True, message=f"recording into {folder}")

    async def StopProfile(self, request: Any, context: ServicerContext) -> common_pb2.ProfileResponse:
        """Write what was recorded."""
        async with statuses(context):
            self._engine.stop_profile()
            return common_pb2.ProfileResponse(success=True, message="written")

    async def GetTokenizer(self, request: Any, context: ServicerContext) -> AsyncIterator[Any]:
        """The tokenizer's files as a zip archive, in pieces; the last has its SHA-256."""
        data = await asyncio.to_thread(_archive, (self._tokenizer, self._model))
        for start in range(0, len(data), _CHUNK):
            last = start + _CHUNK >= len(data)
            digest = hashlib.sha256(data).hexdigest() if last else ""
            yield common_pb2.GetTokenizerChunk(data=data[start : start + _CHUNK], sha256=digest)

    def _chunk(self, request: pb.GenerateRequest, index: int, sample: _Sample) -> pb.GenerateResponse:
        new, sample.sent = slice(sample.sent, None), len(sample.ids)
        chunk = pb.GenerateStreamChunk(
            token_ids=sample.ids[new],
            prompt_tokens=len(request.tokenized.input_ids),
            completion_tokens=len(sample.ids),
            index=index,
        )
        if request.return_logprob:
            chunk.output_logprobs.CopyFrom(_logprobs(sample.ids[new], sample.known[new]))
        return pb.GenerateResponse(request_id=request.request_id, chunk=chunk)

    def _complete(self, request: pb.GenerateRequest, end: Finished, sample: _Sample) -> pb.GenerateResponse:
        complete = pb.GenerateComplete(
            output_ids=sample.ids,
            finish_reason=end.reason,
            prompt_tokens=end.usage.prompt_tokens,
            completion_tokens=end.usage.completion_tokens,
            cached_tokens=end.usage.cached_tokens,
            spec_accepted_tokens=end.usage.accepted,
            spec_draft_tokens=end.usage.drafted,
            index=end.index,
        )
        if isinstance(end.matched, int):
            complete.matched_token_id = end.matched
        elif end.matched is not None:
            complete.matched_stop_str = end.matched
        if request.return_logprob:
            complete.output_logprobs.CopyFrom(_logprobs(sample.ids, sample.known))
        return pb.GenerateResponse(request_id=request.request_id, complete=complete)


def _unsupported(name: str) -> Any:
    async def method(self: SchedulerService, request: Any, context: ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not supported by this server")

    method.__doc__ = f"{name} is not supported."
    return method


for _name in UNSUPPORTED:
    setattr(SchedulerService, _name, _unsupported(_name))


def _logprobs(ids: Sequence[int], known: Sequence[TokenLogprobs]) -> pb.OutputLogProbs:
    top = [pb.TopLogProbs(values=[v for _, v in k.top], token_ids=[i for i, _ in k.top]) for k in known]
    return pb.OutputLogProbs(token_logprobs=[k.logprob for k in known], token_ids=ids, top_logprobs=top)


def _struct(values: dict[str, Any]) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct


def _archive(folders: Sequence[Path]) -> bytes:
    """A zip of the tokenizer's files, each from the first folder that has it; the same bytes every time."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _TOKENIZER_FILES:
            if path := next((f / name for f in folders if (f / name).is_file()), None):
                archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return data.getvalue()
