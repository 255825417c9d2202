"""What decoding did, in the terms people compare: tokens, rounds, accepted length, acceptance per position."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


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
    accepted_at: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[verify_length - 1]: rounds in which the draft at each position stood, before any cut."""

    @property
    def accepted_length(self) -> float:
        """Tokens emitted a round, the backbone's own included: 1 to the verify length; 0 where there was no round."""
        return self.round_tokens / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Share of rounds in which the draft at each position stood."""
        return (self.accepted_at / max(1, self.rounds)).tolist()

    def add_round(self, accepted: int, emitted: int, verify_length: int) -> None:
        """Count one round that accepted and emitted so many."""
        if self.accepted_at.size < verify_length - 1:
            self.accepted_at = np.pad(self.accepted_at, (0, verify_length - 1 - self.accepted_at.size))
        self.rounds += 1
        self.accepted_at[:accepted] += 1
        self.round_tokens += emitted
        self.new_tokens += emitted

    def __add__(self, other: "DecodeStats") -> "DecodeStats":
        width = max(self.accepted_at.size, other.accepted_at.size)
        padded = [np.pad(s.accepted_at, (0, width - s.accepted_at.size)) for s in (self, other)]
        return DecodeStats(
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
            self.round_tokens + other.round_tokens,
            self.rounds + other.rounds,
            padded[0] + padded[1],
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
