"""One sample of a request, from the queue to its last token."""

from array import array
from dataclasses import dataclass, field
from enum import Enum

from mimo_jax.request import SamplingParams
from serve.engine.stops import StopWatcher
from serve.generation import Constraint, GenerationRequest, Usage


class Stage(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """What the host knows of a sequence. Positions count from the prompt's first token."""

    request: GenerationRequest
    index: int
    """Of the sample."""
    sampling: SamplingParams
    """The request's, with the sample's own seed."""
    arrival: int
    """Its number among all sequences: earlier ones come first."""
    constraint: Constraint | None = None
    leader: "Sequence | None" = None
    """The first sample of the same prompt, whose prefill it waits for."""
    watcher: StopWatcher | None = None
    """Finds its stop strings, if it has any."""

    stage: Stage = Stage.WAITING
    tokens: array = field(default_factory=lambda: array("i"))
    """Prompt and output."""
    group: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    planned: int = 0
    """Positions whose prefill is planned, or that were there already."""
    target: int = 0
    """Positions that its prefill is to commit: all tokens it had when it got its slot."""
    in_flight: int = 0
    """Dispatches whose results have not come back."""
    rounds_in_flight: int = 0
    prefilled: bool = False
    """Whether a last chunk was ever planned."""

    cached: int = 0
    """Tokens of the prompt found in the prefix cache, the first time."""
    admitted: bool = False
    """Whether it ever had a slot."""
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    queued_at: float = 0.0
    admitted_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def emitted(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def longest(self) -> int:
        """Positions that it may ever need pages for."""
        return self.prompt_length + self.sampling.max_new_tokens

    @property
    def committed(self) -> int:
        """Positions that are in its caches, as far as the host knows; once it runs, all tokens but the anchor."""
        return max(self.target, len(self.tokens) - 1) if self.stage is Stage.RUNNING else self.planned

    def usage(self) -> Usage:
        """Its counts."""
        return Usage(self.prompt_length, self.cached, self.emitted, self.rounds, self.drafted, self.accepted)
