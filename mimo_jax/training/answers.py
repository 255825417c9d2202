"""Answers of a model as its drafter is trained on them: packed in rows, each from where its prompt begins."""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mimo_jax.training import TrainingError
from mimo_jax.training.packing import pack


@dataclass(frozen=True)
class Answers:
    """Prompts with their answers."""

    pairs: list[tuple[list[int], list[int]]]
    _packed: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False)

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

    def batch(self, step: int, rows: int, length: int, seed: int, alone: bool = False) -> dict[str, np.ndarray]:
        """The batch of a step: rows that hold as many answers as fit, or one alone, each behind its prompt.

        Answers that are longer than a row are cut. Every epoch has each answer once, and rows in an order drawn anew;
        its last batch is filled up with others of its rows. An answer has the same company in every epoch, which it
        never sees.

        Args:
            step: Number of the step.
            rows: Of a batch.
            length: Of these.
            seed: Of the order.
            alone: Whether no answer shares a row.

        Returns:
            `ids` and `answer` [rows, length], `positions` [rows, length] int32 in each prompt and answer, which begin
            at 0, and `lengths` [rows] int32: how many ids of each row are real. Rows of one answer have no `positions`.
        """
        packed = [[n] for n in range(len(self.pairs))] if alone else self.packed(length)
        epoch, at = divmod(step, -(-len(packed) // rows))
        order = np.random.default_rng([seed, epoch]).permutation(len(packed))
        chosen = np.resize(order, max(order.size, (at + 1) * rows))[at * rows : (at + 1) * rows]
        found = self.rows([packed[n] for n in chosen], length)
        if alone:
            del found["positions"]
        return found

    def size(self, number: int, length: int) -> int:
        """Tokens of an answer that a row of `length` has room for behind its prompt."""
        prompt, answer = self.pairs[number]
        return max(0, min(len(answer), length - len(prompt)))

    def packed(self, length: int) -> list[list[int]]:
        """Rows of `length` tokens, as the numbers of the answers in each."""
        if length not in self._packed:
            self._packed[length] = pack(
                [min(length, len(prompt) + len(answer)) for prompt, answer in self.pairs], length
            )
        return self._packed[length]

    def rows(self, numbers: Sequence[Sequence[int]], length: int) -> dict[str, np.ndarray]:
        """Arrays of rows that hold the answers of these numbers, one after the other (see `batch`)."""
        shape = len(numbers), length
        ids, answer = np.zeros(shape, np.int32), np.zeros(shape, bool)
        positions, lengths = np.zeros(shape, np.int32), np.zeros(len(numbers), np.int32)
        for row, of_row in enumerate(numbers):
            for number in of_row:
                prompt, answered = self.pairs[number]
                whole, start = (prompt + answered)[:length], lengths[row]
                lengths[row] = end = start + len(whole)
                ids[row, start:end] = whole
                answer[row, start + len(prompt) : end] = True
                positions[row, start:end] = np.arange(len(whole))
        return {"ids": ids, "answer": answer, "positions": positions, "lengths": lengths}


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
