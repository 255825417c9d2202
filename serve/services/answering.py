"""Requests of our own protocol, answered: what every service that speaks text stands on."""

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace

from grpc.aio import ServicerContext

from mimo_jax.request import SamplingParams
from mimo_jax.tokenizer import Tokenizer
from serve.generation import Finished, GenerationRequest, RoundTokens, TokenLogprobs, Usage
from serve.protos.mimo.serve.v1 import generation_pb2 as pb
from serve.services.requests import Requests
from serve.services.seeds import derived_seed
from serve.services.text_request import Prompt, read_request
from serve.text.answer import Answer
from serve.text.tool_calls import ToolCall

_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}


class Answering:
    """An engine with its tokenizer, asked in text.

    Args:
        requests: Where they go.
        tokenizer: Of the engine's model.
        defaults: What requests are decoded with where they say nothing.
        stream_interval: Tokens that a message has at least, but for a sample's last, where a request says nothing.
    """

    def __init__(
        self,
        requests: Requests,
        tokenizer: Tokenizer,
        defaults: SamplingParams | None = None,
        *,
        stream_interval: int = 1,
    ) -> None:
        self.requests, self.engine, self.tokenizer = requests, requests.engine, tokenizer
        self.defaults, self._interval = defaults or SamplingParams(), stream_interval

    async def answer(
        self, message: pb.GenerateRequest, context: ServicerContext
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Messages of one round or more, and one for every sample's end. Closing it aborts what is left.

        Raises:
            Refused: It cannot be served.
            EngineFailed: The engine died.
            TimeoutError: The deadline passed.
        """
        requests, request_id = self.requests, message.request_id or uuid.uuid4().hex
        defaults = replace(self.defaults, seed=derived_seed(requests.seed, request_id))
        samples: list[_Sample] = []

        def read(until: float | None) -> GenerationRequest:
            request, prompt = read_request(
                message, request_id, self.tokenizer, self.engine.info, defaults, requests.compiler, until
            )
            samples.extend(_Sample(self.tokenizer, request, prompt, index) for index in range(request.n))
            return request

        interval = message.stream_interval if message.HasField("stream_interval") else self._interval
        async with aclosing(requests.events(request_id, context, read)) as events:
            async for event in events:
                sample = samples[event.index]
                if isinstance(event, RoundTokens):
                    sample.add(event)
                    if sample.held >= interval:
                        yield sample.round()
                else:
                    if sample.held:
                        yield sample.round()
                    yield sample.finished(event)


class _Sample:
    """Turns one sample's events into messages."""

    def __init__(self, tokenizer: Tokenizer, request: GenerationRequest, prompt: Prompt, index: int) -> None:
        self._tokenizer, self._request_id, self._index = tokenizer, request.request_id, index
        self._answer = Answer(tokenizer, request.sampling.stop, prompt.thinking, prompt.functions)
        self._calls = 0
        self._round = pb.Round()
        self._stood: list[int] = []
        """For each position of a block: rounds in which the draft there stood."""

    @property
    def held(self) -> int:
        """Tokens that are in no message yet."""
        return len(self._round.token_ids)

    def add(self, event: RoundTokens) -> None:
        """Take a round."""
        message, said = self._round, self._answer.push(event.token_ids)
        message.token_ids.extend(event.token_ids)
        message.text += said.text
        message.reasoning += said.reasoning
        message.drafted += event.drafted
        message.accepted += event.accepted
        stood = self._stood
        if event.drafted > len(stood):
            stood += [0] * (event.drafted - len(stood))
        for position in range(event.accepted):
            stood[position] += 1
        message.tool_calls.extend(self._named(said.calls))
        if event.logprobs:
            message.logprobs.extend(
                self._logprob(token, known) for token, known in zip(event.token_ids, event.logprobs, strict=True)
            )

    def round(self) -> pb.GenerateResponse:
        """What was taken since the last message."""
        message, self._round = self._round, pb.Round()
        return pb.GenerateResponse(request_id=self._request_id, index=self._index, round=message)

    def finished(self, event: Finished) -> pb.GenerateResponse:
        said = self._answer.finish()
        calls = self._named(said.calls)
        matched = self._answer.matched or event.matched
        reason = _REASONS["stop" if self._answer.matched and event.reason != "abort" else event.reason]
        if reason == pb.FINISH_REASON_STOP and self._calls:
            reason = pb.FINISH_REASON_TOOL_CALLS
        message = pb.Finished(
            reason=reason,
            message=event.message,
            usage=_usage(event.usage, self._stood),
            text=said.text,
            reasoning=said.reasoning,
            tool_calls=calls,
        )
        if isinstance(matched, str):
            message.stop = matched
        elif matched is not None:
            message.stop_token_id = matched
        return pb.GenerateResponse(request_id=self._request_id, index=self._index, finished=message)

    def _named(self, calls: Sequence[ToolCall]) -> list[pb.ToolCall]:
        """Calls with ids that no other call has."""
        first = self._calls
        self._calls += len(calls)
        return [
            pb.ToolCall(
                id=f"call_{self._request_id}_{self._index}_{number}", name=call.name, arguments=call.arguments_json
            )
            for number, call in enumerate(calls, first)
        ]

    def _logprob(self, token: int, known: TokenLogprobs) -> pb.TokenLogprob:
        spell = self._tokenizer.token_bytes
        return pb.TokenLogprob(
            id=token,
            token=spell(token, skip_special=False),
            logprob=known.logprob,
            top=[pb.TokenLogprob(id=i, token=spell(i, skip_special=False), logprob=p) for i, p in known.top],
        )


def _usage(usage: Usage, stood: Sequence[int]) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        rounds=usage.rounds,
        drafted=usage.drafted,
        accepted=usage.accepted,
        accepted_length=usage.accepted / usage.rounds + 1 if usage.rounds else 0.0,
        accepted_at=stood,
    )


async def whole(responses: AsyncIterator[pb.GenerateResponse]) -> pb.CompleteResponse:
    """All messages of one request as one."""
    request_id = ""
    samples: dict[int, _Whole] = {}
    async for response in responses:
        request_id = response.request_id
        samples.setdefault(response.index, _Whole()).add(response)
    return pb.CompleteResponse(request_id=request_id, samples=[samples[i].sample() for i in sorted(samples)])


class _Whole:
    """One sample, put together."""

    def __init__(self) -> None:
        self._sample = pb.Sample()
        self._text: list[str] = []
        self._reasoning: list[str] = []

    def add(self, response: pb.GenerateResponse) -> None:
        part = response.round if response.HasField("round") else response.finished
        self._text.append(part.text)
        self._reasoning.append(part.reasoning)
        self._sample.tool_calls.extend(part.tool_calls)
        if isinstance(part, pb.Round):
            self._sample.token_ids.extend(part.token_ids)
            self._sample.logprobs.extend(part.logprobs)
        else:
            self._sample.finished.CopyFrom(part)
            for name in ("text", "reasoning", "tool_calls"):
                self._sample.finished.ClearField(name)

    def sample(self) -> pb.Sample:
        self._sample.text, self._sample.reasoning = "".join(self._text), "".join(self._reasoning)
        return self._sample
