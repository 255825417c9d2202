"""What an `Executor` is to the engine, without a model: programs take as long as they are told to."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.speculative import Rounds
from serve.engine.commands import Command, CommandBuilder
from serve.engine.scheduler import Sizes


@dataclass(frozen=True)
class Clocks:
    """Seconds."""

    wall: float
    process: float
    """Of processor time, of all threads."""
    engine: float
    """Of processor time, of the engine's thread."""

    @classmethod
    def now(cls) -> "Clocks":
        """To be asked in the engine's thread."""
        return cls(time.monotonic(), time.process_time(), time.thread_time())


@dataclass(frozen=True)
class _Pending:
    """What a program gives, once it is there."""

    rounds: Rounds
    ready: float
    """`time.monotonic()`."""


class ScriptedDevice:
    """Runs prefills and decode steps in order, each for a fixed time, as `serve.engine.batching.Device`.

    From the first step in which all slots decode, a round gives every row the same number of tokens, until it has as
    many as were asked for; rounds before give none. So requests of one length decode together from the first round to
    the last. There are no drafts to constrain and no log-probabilities.

    Args:
        sizes: Of one data-parallel group.
        vocab_size: Of the model that is not there.
        capacity: Positions that a sequence may grow to.
        seconds: That a prefill or a decode step takes; 0: its result is there at once.
        tokens: That a round gives a row, 1 to `sizes.verify_length`.
    """

    def __init__(self, sizes: Sizes, *, vocab_size: int, capacity: int, seconds: float, tokens: int) -> None:
        if not 1 <= tokens <= sizes.verify_length:
            raise ValueError(f"a round gives 1 to {sizes.verify_length} tokens a row, not {tokens}")
        self.sizes = sizes
        self.builder = CommandBuilder(sizes, vocab_size, (), -(-capacity // sizes.page_size))
        self._seconds, self._tokens = seconds, tokens
        self._left = np.zeros(sizes.slots + 1, np.int32)
        """Tokens that each slot may yet give; the last is nobody's."""
        self._free_at = 0.0
        self.steps = 0
        """Decode steps that gave tokens."""
        self.begun = self.ended = Clocks(0.0, 0.0, 0.0)
        """When the first of them was asked for, and when the last one's result was taken."""

    def run(self, command: Command) -> Any:
        """Begin a program once those before it have ended."""
        match command.bucket.program:
            case "admit":
                (admission,) = command.arguments
                self._left[admission.slots] = admission.requests.max_new_tokens - admission.emitted
                self._left[-1] = 0
                return None
            case "save":
                return None
            case "prefill":
                rows, chunk, _ = command.arguments
                return self._pending(self._round(rows.slots, chunk.last.astype(np.int32)))
            case "decode":
                (rows,) = command.arguments
                asking = int((self._left[rows.slots] > 0).sum())
                together = asking == self.sizes.slots or (self.steps > 0 and asking > 0)
                if together:
                    self.begun = self.begun if self.steps else Clocks.now()
                    self.steps += 1
                most = np.full(len(rows.slots), self._tokens * together, np.int32)
                return self._pending(*(self._round(rows.slots, most) for _ in range(self.sizes.rounds)))
            case program:
                raise ValueError(f"a scripted device has no program {program!r}: ask without constraints")

    def fetch(self, result: Any) -> Any:
        """Wait for a result."""
        if result is None:
            return 0
        time.sleep(max(0.0, result.ready - time.monotonic()))  # as for a real device, others may run meanwhile
        self.ended = Clocks.now() if result.rounds.counts.any() else self.ended
        return result.rounds

    def start_profile(self, folder: Path) -> None:
        """There is nothing to record."""

    def stop_profile(self) -> None:
        """There is nothing to write."""

    def _round(self, slots: Any, most: Any) -> Rounds:
        """One round in which these slots get so many tokens at most."""
        counts = np.minimum(most, self._left[slots])
        np.subtract.at(self._left, slots, counts)
        length = self.sizes.verify_length
        tokens = np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), (len(slots), length))
        return Rounds(tokens[:, 1:], tokens, counts, np.maximum(counts - 1, 0), self._left[slots] > 0)  # pyright: ignore

    def _pending(self, *rounds: Rounds) -> _Pending:
        self._free_at = max(self._free_at, time.monotonic()) + self._seconds
        fields = ("drafts", "tokens", "counts", "accepted", "active")
        together: Any = {name: np.stack([getattr(one, name) for one in rounds]) for name in fields}
        return _Pending(Rounds(**together), self._free_at)
