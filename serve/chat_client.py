"""A conversation with a running server, without a terminal."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from serve.channel import key_metadata, open_channel
from serve.protos.mimo.serve.v1 import generation_pb2 as pb
from serve.protos.mimo.serve.v1.generation_pb2_grpc import GenerationStub


class ServerError(ValueError):
    """A server that is not there, or what it answered instead of an answer."""


@dataclass
class Turn:
    """One answer, as far as it came."""

    text: str = ""
    reasoning: str = ""
    end: pb.Finished | None = None
    """None while it goes on, and if it was broken off."""
    begun: float = field(default_factory=time.monotonic)
    first: float | None = None
    """`time.monotonic()` of the first message that held tokens; that of the latest is `latest`."""
    latest: float = 0.0
    first_tokens: int = 0
    tokens: int = 0

    def add(self, part: pb.Round | pb.Finished) -> None:
        """Take what came."""
        self.text += part.text
        self.reasoning += part.reasoning
        if isinstance(part, pb.Finished):
            self.end = part
            return
        self.latest = time.monotonic()
        self.tokens += len(part.token_ids)
        if self.first is None:
            self.first, self.first_tokens = self.latest, self.tokens

    @property
    def statistics(self) -> str:
        """Tokens, speed and accepted length, for people."""
        if self.first is None:
            return "no tokens"
        parts = [f"{self.tokens} tokens"]
        later, seconds = self.tokens - self.first_tokens, self.latest - self.first
        if later and seconds > 0:
            parts.append(f"{later / seconds:.1f} tokens/s")
        parts.append(f"first after {self.first - self.begun:.2f} s")
        if self.end and self.end.usage.rounds:
            parts.append(f"accepted length {self.end.usage.accepted_length:.2f}")
        if self.end and self.end.usage.cached_tokens:
            parts.append(f"{self.end.usage.cached_tokens} of {self.end.usage.prompt_tokens} prompt tokens cached")
        return ", ".join(parts)


class Conversation:
    """What was said so far, and a server that goes on with it.

    Args:
        server: Asked.
        sampling: For every answer.
        system: What the model is told first; empty: what its template says by itself.
        thinking: Whether it thinks first; None: as its template says.
    """

    def __init__(self, server: "Server", sampling: pb.Sampling, system: str = "", thinking: bool | None = None) -> None:
        self._server, self.sampling, self.system, self._thinking = server, sampling, system, thinking
        self.messages: list[pb.ChatMessage] = []
        """All turns but the system's."""

    def ask(self, text: str, turn: Turn) -> Generator[tuple[str, str]]:
        """Pieces of reasoning and of text, as they come; `turn` is filled in.

        However the answer ends, what came of it is part of the conversation. Where nothing came, the question is not
        either. Closing the iterator ends the answer.

        Raises:
            ServerError: The server refused, or failed.
        """
        question = pb.ChatMessage(role="user", content=text)
        system = [pb.ChatMessage(role="system", content=self.system)] if self.system else []
        chat = pb.Chat(messages=[*system, *self.messages, question], enable_thinking=self._thinking)
        request = pb.GenerateRequest(chat=chat, sampling=self.sampling)
        try:
            with closing(self._server.stream(request)) as responses:
                for response in responses:
                    part = response.round if response.HasField("round") else response.finished
                    turn.add(part)
                    if part.text or part.reasoning:
                        yield part.reasoning, part.text
        finally:
            if turn.text or turn.reasoning:
                said = pb.ChatMessage(role="assistant", content=turn.text, reasoning=turn.reasoning)
                self.messages += [question, said]


class Server:
    """A server that is there."""

    def __init__(self, address: str, channel: grpc.Channel, metadata: Sequence[tuple[str, str]]) -> None:
        self._address, self._stub, self._metadata = address, GenerationStub(channel), metadata

    def describe(self) -> pb.GetServerInfoResponse:
        """What it serves. Raises `ServerError` if it is not ready, or speaks another protocol."""
        with self._errors():
            return self._stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=self._metadata, timeout=30)

    def stream(self, request: pb.GenerateRequest) -> Generator[pb.GenerateResponse]:
        """Its answers. Closing the iterator, or an exception inside it, cancels the request."""
        call: Any = self._stub.Generate(request, metadata=self._metadata)
        try:
            with self._errors():
                yield from call
        finally:
            call.cancel()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            call: Any = error
            code, details = call.code(), call.details()
            if code is grpc.StatusCode.UNIMPLEMENTED and not details:
                details = "this server does not speak mimo.serve.v1"
            raise ServerError(f"{self._address}: {code.name}: {details}") from None


@contextmanager
def connected(address: str, *, api_key: str | None, ca_file: Path | None, timeout: float) -> Iterator[Server]:
    """A server that is there; over TLS if a file of its authorities is given.

    Raises:
        ServerError: Nobody listens there within `timeout` seconds.
        OSError: The file cannot be read.
    """
    channel = open_channel(grpc, address, ca_file)
    with channel:
        try:
            grpc.channel_ready_future(channel).result(timeout)
        except grpc.FutureTimeoutError:
            raise ServerError(
                f"no gRPC server answers at {address} within {timeout:g} s: start one with mimo-serve, or name its "
                "address with --address HOST:PORT"
            ) from None
        yield Server(address, channel, key_metadata(api_key))
