"""Text as training sees it: one long row of token ids, of which some are answers, cut into windows."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mimo_jax.chat_template import Message
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training import TrainingError

Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Tokens:
    """Documents one after the other."""

    ids: np.ndarray
    """[n] int32."""
    answer: np.ndarray
    """[n] bool: tokens that a model wrote, or should write, rather than was given; the end of an answer is one."""

    @classmethod
    def read(cls, path: Path, vocab_size: int) -> "Tokens":
        """Read what `write` wrote.

        Raises:
            TrainingError: It is no such file, or holds ids outside the vocabulary.
        """
        try:
            tensors = load_file(path)
            ids, answer = tensors["ids"].astype(np.int32), tensors["answer"].astype(bool)
        except (OSError, SafetensorError, KeyError) as error:
            raise TrainingError(f"{path}: cannot be read as a file of tokens ({error})") from None
        if ids.ndim != 1 or ids.shape != answer.shape or not ids.size:
            raise TrainingError(f"{path}: expected ids and answer [n], not {list(ids.shape)} and {list(answer.shape)}")
        return cls(ids, answer).checked(vocab_size, path)

    def checked(self, vocab_size: int, path: Path) -> "Tokens":
        """These tokens; raises `TrainingError`, naming where they are from, if an id is outside the vocabulary."""
        if self.ids.min() < 0 or self.ids.max() >= vocab_size:
            raise TrainingError(
                f"{path}: holds token {self.ids.max()}, the model's vocabulary has {vocab_size}: "
                f"the text was encoded by the tokenizer of another model"
            )
        return self

    @property
    def digest(self) -> str:
        """Tells these tokens from others."""
        return f"{self.ids.size} tokens, crc32 {zlib.crc32(self.ids.tobytes() + self.answer.tobytes()):08x}"

    def write(self, path: Path) -> None:
        """Write a safetensors file of both arrays."""
        save_file({"ids": self.ids, "answer": self.answer}, path)

    def batch(self, step: int, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
        """The batch of a step: `ids` and `answer` [rows, length], windows in an order shuffled anew for every epoch.

        Raises:
            TrainingError: There is less than one window.
        """
        count = self.ids.size // length
        if count < 1:
            raise TrainingError(f"the corpus has {self.ids.size} tokens, less than one window of {length}")
        chosen = []
        for n in range(step * rows, (step + 1) * rows):
            epoch, at = divmod(n, count)
            chosen.append(int(_order(seed, epoch, count)[at]))
        parts = [slice(i * length, (i + 1) * length) for i in chosen]
        return {"ids": np.stack([self.ids[p] for p in parts]), "answer": np.stack([self.answer[p] for p in parts])}


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, epoch, count)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _orders[key]


def tokenize(
    documents: Iterable[str | Conversation], tokenizer: Tokenizer, progress: Callable[[], None] = lambda: None
) -> Tokens:
    """Encode texts and conversations; each text ends with `<|endoftext|>`, all of it is answer."""
    end = end_of_text(tokenizer)
    ids: list[int] = []
    answer: list[bool] = []
    for document in documents:
        progress()
        if isinstance(document, str):
            new = [*tokenizer.encode(document), end]
            ids += new
            answer += [True] * len(new)
            continue
        for given, answered in turns(document, tokenizer):
            ids += given + answered
            answer += [False] * len(given) + [True] * len(answered)
        ids.append(end)
        answer.append(False)
    return Tokens(np.array(ids, np.int32), np.array(answer, bool))


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that ends a document; raises `TrainingError` if there is none."""
    end = tokenizer.token_id("<|endoftext|>")
    if end is None:
        raise TrainingError("the tokenizer has no <|endoftext|>, which ends a document")
    return end


def turns(messages: Conversation, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """The conversation as (what is given, an answer), answer by answer, as serving would see it."""
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.encode_chat(messages[:i])
        whole = tokenizer.encode_chat(messages[: i + 1], add_generation_prompt=False)
        if whole[: len(before)] != before:
            raise TrainingError("the chat template writes an answer differently once it is given: cannot train on it")
        yield whole[done : len(before)], whole[len(before) :]
        done = len(whole)
