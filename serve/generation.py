"""The words that services and the engine have for a request. Plain Python: nothing here knows JAX or gRPC."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol

from mimo_jax.request import SamplingParams


class Refused(Exception):
    """A request that the engine did not take; the message is for the client."""


class InvalidRequest(Refused):
    """It can never be served as it stands."""


class NotFound(Refused):
    """It names something that is not here."""


class Unsupported(Refused):
    """It asks for what this server does not do at all."""


class DuplicateRequest(Refused):
    """Its id belongs to a request that is still alive."""


class QueueFull(Refused):
    """As many requests wait as may.

    Args:
        message: For the client.
        retry_after: Seconds after which another try is reasonable.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotServing(Refused):
    """The engine is still starting, is draining, or has failed."""


class EngineFailed(Exception):
    """The engine died while a request was in it."""


class Constraint(Protocol):
    """What one sequence may go on with. It has seen the tokens it was advanced by, none of the prompt."""

    def fill_masks(self, drafts: Sequence[int], masks: Any) -> None:
        """Say what is allowed after each prefix of some drafts.

        Args:
            drafts: Tokens that may come next; nothing is advanced by them.
            masks: NumPy [len(drafts) + 1, ceil(vocab / 32)] int32, written: row i allows token t, after the first i
                drafts, where bit t % 32 of word t // 32 is set. After a draft that is not allowed, everything is.
        """
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """Take tokens that stand; those after an end-of-text token are ignored."""
        ...

    def copy(self) -> "Constraint":
        """One in the same state that advances on its own."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """What a service asks of the engine, checked as far as can be without it."""

    request_id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    """Independent samples of one prompt."""
    logprobs: bool = False
    """Whether rounds come with the log-probabilities of their tokens."""
    top_logprobs: int = 0
    """How many of the likeliest tokens come with each; at most `MAX_TOP_LOGPROBS`."""
    constraint: Constraint | None = None
    """Where given, at the beginning of the output; every sample works on a copy."""
    deadline: float | None = None
    """`time.monotonic()` after which nobody waits for it any more."""
    text: str | None = None
    """Of the prompt, where it came as text; for the log alone."""
    trace: Any = None
    """What a tracer wants handed on; the engine only carries it."""


MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of one token, under the backbone at temperature 1 before any truncation."""

    logprob: float
    top: Sequence[tuple[int, float]] = ()
    """The likeliest ids with theirs, best first."""


@dataclass(frozen=True)
class RoundTokens:
    """What one round, or the prefill, gave one sample. Never empty."""

    index: int
    """Of the sample, 0 to n - 1."""
    token_ids: Sequence[int]
    drafted: int = 0
    """Drafts the round verified."""
    accepted: int = 0
    """Drafts the backbone agreed with."""
    logprobs: Sequence[TokenLogprobs] = ()
    """One a token, if asked for."""


FinishReason = Literal["stop", "length", "abort", "deadline"]


@dataclass(frozen=True)
class Usage:
    """Counts of one sample. A round's accepted length is its accepted drafts plus one."""

    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt, found in the prefix cache."""
    completion_tokens: int = 0
    rounds: int = 0
    """Verify passes."""
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Finished:
    """The last word on one sample."""

    index: int
    reason: FinishReason
    usage: Usage
    matched: int | str | None = None
    """The stop token or stop string that ended it."""
    message: str = ""
    """Why, where it was aborted."""


Event = RoundTokens | Finished


class Status(Enum):
    """Where an engine's life stands."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STALLED = "stalled"
    """There is work, and no step has come back for longer than the watchdog allows."""
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def alive(self) -> bool:
        """Whether the process is worth keeping."""
        return self in (Status.STARTING, Status.READY, Status.DRAINING)


@dataclass(frozen=True)
class Load:
    """How busy an engine is, at one moment. Tokens are positions of full-attention pages."""

    running: int = 0
    waiting: int = 0
    slots: int = 0
    used_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    """Held only for later prefix hits; they count as free."""
    snapshots: int = 0
    total_snapshots: int = 0


@dataclass(frozen=True)
class EngineInfo:
    """What does not change while an engine serves."""

    model: str
    """The name it is served under."""
    vocab_size: int
    eos_ids: Sequence[int]
    context_length: int
    """Prompt and output together."""
    max_running: int
    max_queued: int
    page_size: int
    block_size: int
    """Tokens a round may give; 1 without a drafter."""
    architecture: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """The resolved command line, for people and gateways to read."""


class Engine(Protocol):
    """What services see of an engine. Every method may be called from the event loop and returns at once."""

    @property
    def info(self) -> EngineInfo:
        """What does not change."""
        ...

    @property
    def status(self) -> Status:
        """Where its life stands."""
        ...

    def load(self) -> Load:
        """How busy it is."""
        ...

    def submit(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Queue a request.

        The iterator gives each sample's rounds in order, ends after every sample is `Finished`, and raises
        `EngineFailed` if the engine dies. Closing it (`aclose`, or cancelling the task that iterates) aborts what is
        left.

        Raises:
            Refused: At once, if the request cannot be taken.
        """
        ...

    def abort(self, request_id: str, message: str = "") -> bool:
        """End a request at the next step: its iterator gives `Finished` with reason "abort", and no more tokens.

        Returns False if there is no such request.
        """
        ...

    async def flush_cache(self) -> bool:
        """Forget all cached prefixes; False if requests are in the engine, and nothing was done."""
        ...

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests, and wait until the ones inside are finished; False if some were aborted at the end."""
        ...

    def start_profile(self, folder: str | None = None) -> str:
        """Begin to record what the devices do; gives the folder. Raises `Refused` if it is being recorded."""
        ...

    def stop_profile(self) -> None:
        """Write what was recorded. Raises `Refused` if nothing is being recorded."""
        ...
