"""Answers of a model as its drafter is trained on them: one a row, from where its prompt begins, as in decoding."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimo_jax.training import TrainingError

SHORTEST_ROW = 64


@dataclass(frozen=True)
class Answers:
    """Prompts with their answers."""

    pairs: list[tuple[list[int], list[int]]]

    @classmethod
    def read(cls, path: Path, vocab_size: int) -> "Answers":
        """Read what `regenerate` wrote.

        Raises:
            TrainingError: It holds no answers, or ids outside the vocabulary.
        """
        pairs = list(read_answers(path))
        if not any(answer for _, answer in pairs):
            raise TrainingError(f"{path}: holds no answers to learn from")
        highest = max(max(prompt + answer, default=0) for prompt, answer in pairs)
        if highest >= vocab_size:
            raise TrainingError(
                f"{path}: holds token {highest}, the model's vocabulary has {vocab_size}: these are answers of "
                f"another model"
            )
        return cls(pairs)

    @property
    def digest(self) -> str:
        """Tells these answers from others."""
        return f"{len(self.pairs)} answers, crc32 {zlib.crc32(json.dumps(self.pairs).encode()):08x}"

    def batch(self, step: int, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
        """The batch of a step: `rows` * `length` tokens, of answers of about one length.

        Rows are as long as the power of two that holds each whole, at most `length`, where longer ones are cut; there
        are as many more of them as they are shorter. Every epoch has each answer once, in an order drawn anew; the last
        batch of each length is filled up with others of its length.

        Args:
            step: Number of the step.
            rows: Of a batch of the longest rows.
            length: Of these.
            seed: Of the order.

        Returns:
            `ids` and `answer` [rows, length], and `lengths` [rows] int32: how many ids of each row are real.
        """
        by_length: dict[int, list[int]] = {}
        for number, pair in enumerate(self.pairs):
            by_length.setdefault(_row_length(sum(map(len, pair)), length), []).append(number)
        batches = [
            (longest, start)
            for longest, numbers in by_length.items()
            for start in range(0, len(numbers), rows * length // longest)
        ]
        epoch, at = divmod(step, len(batches))
        longest, start = batches[np.random.default_rng([seed, epoch]).permutation(len(batches))[at]]
        size = rows * length // longest
        order = np.random.default_rng([seed, epoch, longest]).permutation(by_length[longest])
        chosen = np.resize(order, max(order.size, start + size))[start : start + size]
        ids, answer = np.zeros((len(chosen), longest), np.int32), np.zeros((len(chosen), longest), bool)
        lengths = np.zeros(len(chosen), np.int32)
        for row, number in enumerate(chosen):
            prompt, answered = self.pairs[number]
            whole = (prompt + answered)[:longest]
            lengths[row] = len(whole)
            ids[row, : len(whole)] = whole
            answer[row, len(prompt) : len(whole)] = True
        return {"ids": ids, "answer": answer, "lengths": lengths}


def row_lengths(longest: int) -> list[int]:
    """All lengths that rows may have where the longest are so long."""
    return sorted({_row_length(1 << i, longest) for i in range(longest.bit_length() + 1)})


def _row_length(tokens: int, longest: int) -> int:
    return min(longest, max(SHORTEST_ROW, 1 << (tokens - 1).bit_length()))


def read_answers(path: Path) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and answers, in order; a last line that was cut short is left out."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            pair = json.loads(line)
            yield pair["prompt_ids"], pair["answer_ids"]
        except (ValueError, KeyError, TypeError):
            if number > 1 and not line.endswith("}"):
                return
            raise TrainingError(f"{path}:{number}: not an object of prompt_ids and answer_ids") from None
