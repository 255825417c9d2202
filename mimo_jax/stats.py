"""What decoding did, in the terms people compare: tokens, rounds, accepted length, acceptance per position."""

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any


@dataclass
class DecodeStats:
    """Counts of one request, or of several added up."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    """Tokens emitted, the prefill's first token included, nothing after a cut."""
    round_tokens: int = 0
    """Of these, tokens that rounds emitted."""
    rounds: int = 0
    """Rounds a request took part in while unfinished."""
    accepted_at: list[int] = field(default_factory=list)
    """For each of verify_length - 1 positions: rounds in which the draft there stood, before any cut."""

    @property
    def accepted_length(self) -> float:
        """Tokens emitted a round, the backbone's own included: 1 to the verify length; 0 where there was no round."""
        return self.round_tokens / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Share of rounds in which the draft at each position stood."""
        return [n / self.rounds for n in self.accepted_at]

    def add_round(self, accepted: int, emitted: int, verify_length: int) -> None:
        """Count one round that accepted and emitted so many."""
        self.rounds += 1
        stood = [int(r < accepted) for r in range(verify_length - 1)]
        self.accepted_at = _added(self.accepted_at, stood)
        self.round_tokens += emitted
        self.new_tokens += emitted

    def __add__(self, other: "DecodeStats") -> "DecodeStats":
        return DecodeStats(
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
            self.round_tokens + other.round_tokens,
            self.rounds + other.rounds,
            _added(self.accepted_at, other.accepted_at),
        )

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
            "accepted_length": round(self.accepted_length, 4),
            "acceptance_per_position": [round(a, 4) for a in self.acceptance],
        }


def _added(one: list[int], other: list[int]) -> list[int]:
    """Sums position by position; the shorter list counts as zero beyond its end."""
    return [a + b for a, b in zip_longest(one, other, fillvalue=0)]
