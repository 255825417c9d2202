"""What a person asks for: sampling settings of one request, and a batch of them as the arrays programs take."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mimo_jax.sampling import Sampling
from mimo_jax.speculative import Requests


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Greedy by default; the release recommends temperature 1.0 with top_p 0.95."""

    max_new_tokens: int = 256
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample from the k best tokens; 0 means all."""
    top_p: float = 1.0
    """Sample from the fewest best tokens that hold this share of the probability top_k leaves."""
    min_p: float = 0.0
    """Leave out tokens below this share of the best token's probability."""
    repetition_penalty: float = 1.0
    """Above 1: make tokens of prompt and output less likely."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time a token is in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int = 0
    """Same seed, same prompt: same samples, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; neither they nor anything after them is part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, besides the model's own."""
    ignore_eos: bool = False
    """Go on past the model's end-of-text tokens."""

    def __post_init__(self) -> None:
        for name in _LIMITS:
            low, high = _LIMITS[name]
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | float) or not low <= given <= high:
                raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {given!r}")
        for name in ("max_new_tokens", "top_k", "seed"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be an integer, not {getattr(self, name)!r}")
        if any(not s for s in self.stop):
            raise ValueError("a stop string must not be empty")
        if not all(math.isfinite(b) for b in self.logit_bias.values()):
            raise ValueError("logit_bias values must be finite numbers")

    def stops(self, eos_ids: Collection[int]) -> set[int]:
        """Token ids that end the output of a model with these end-of-text tokens."""
        return {*self.stop_token_ids, *(() if self.ignore_eos else eos_ids)}


_LIMITS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 2**31 - 1),
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (1e-9, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-1e3, 1e3),
    "frequency_penalty": (-1e3, 1e3),
    "seed": (0, 2**32 - 1),
}


def check_requests(
    prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], vocab_size: int, max_positions: int
) -> None:
    """Raise `ValueError` unless every prompt has known tokens and fits the context with what is asked for."""
    if not prompts:
        raise ValueError("no prompts given")
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        name = "the prompt" if len(prompts) == 1 else f"prompt {i}"
        if not prompt:
            raise ValueError(f"{name} is empty: there must be at least one token to continue")
        if len(prompt) + p.max_new_tokens > max_positions:
            raise ValueError(
                f"{name} has {len(prompt)} tokens and asks for {p.max_new_tokens} new ones, "
                f"more than the model's context of {max_positions}; shorten it or lower max_new_tokens"
            )
        check_ids(prompt, vocab_size, name)
        check_ids(p.stop_token_ids, vocab_size, f"stop_token_ids of {name}")
        check_ids(tuple(p.logit_bias), vocab_size, f"logit_bias of {name}")


def check_ids(ids: Sequence[int], vocab_size: int, what: str) -> None:
    """Raise `ValueError` unless all ids are in the vocabulary."""
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise ValueError(f"{what}: token id {wrong[0]} is outside the vocabulary of {vocab_size}")


def batch_requests(
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    eos_ids: Sequence[int],
    vocab_size: int,
    stops: int = 4,
    biases: int = 1,
) -> Requests:
    """Requests as arrays on the host, one row a request.

    Args:
        prompts: Their token ids.
        params: Their settings.
        eos_ids: The model's end-of-text tokens, which end every request that does not ignore them.
        vocab_size: Of the model's logits.
        stops: Room for stop tokens, at least.
        biases: Room for logit biases, at least.

    Ids must be in the vocabulary (`check_requests`).
    """
    stop_ids = [sorted(p.stops(eos_ids)) for p in params]
    biased = [sorted(p.logit_bias.items()) for p in params]
    seen: Any = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in enumerate(prompts):
        seen[row, np.asarray(prompt, np.int64)] = True

    def column(name: str, dtype: str) -> Any:
        return np.array([getattr(p, name) for p in params], dtype)

    sampling = Sampling(
        temperature=column("temperature", "float32"),
        top_k=column("top_k", "int32"),
        top_p=column("top_p", "float32"),
        min_p=column("min_p", "float32"),
        repetition_penalty=column("repetition_penalty", "float32"),
        presence_penalty=column("presence_penalty", "float32"),
        frequency_penalty=column("frequency_penalty", "float32"),
        seed=column("seed", "uint32"),
        bias_ids=_padded([[i for i, _ in b] for b in biased], -1, "int32", least=biases),
        bias=_padded([[v for _, v in b] for b in biased], 0.0, "float32", least=biases),
        prompt_seen=seen,
    )
    return Requests(sampling, _padded(stop_ids, -1, "int32", least=stops), column("max_new_tokens", "int32"))


def _padded(rows: Sequence[Sequence[float]], filler: float, dtype: str, least: int) -> Any:
    """Rows of unequal length as one array; its width is `least` or a power of two: few widths are ever compiled."""
    # none is empty: the partitioner of jaxlib 0.11.2 crashes on an empty argument that a loop carries
    longest = max(least, max(map(len, rows), default=0))
    width = 1 << (longest - 1).bit_length()
    return np.array([[*row, *[filler] * (width - len(row))] for row in rows], dtype).reshape(len(rows), width)
