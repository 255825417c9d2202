"""Decoding one batch: prompts in, tokens out, the device programs in between compiled once a shape."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from mimo_jax.model import Model
from mimo_jax.request import SamplingParams, batch_requests, check_requests
from mimo_jax.speculative import PromptChunk, Rounds, decode, prefill
from sharding.layout import place

MAX_CHUNK = 512
"""Prompt tokens a row at a time."""


@dataclass(frozen=True)
class Decoding:
    """How a batch is decoded. Only `sampled_drafts` can change tokens, and not their law."""

    verify_length: int | None = None
    """Rows the backbone verifies a round, 1 (plain decoding) to the drafter's block size. Default: the whole block."""
    rounds_per_dispatch: int = 8
    """Rounds the device runs before the host looks at their tokens."""
    sampled_drafts: bool = False
    """Draw drafts instead of taking the best (see `speculative.decode`)."""


@dataclass(frozen=True)
class Step:
    """What one dispatch gave, on the host."""

    tokens: list[list[int]]
    """New tokens of each row."""
    rounds: Rounds | None
    """The rounds that ran, as NumPy arrays; None for a prefill."""
    seconds: float


class Session:
    """A batch of requests on the device, from empty caches to finished rows.

    Args:
        model: A loaded model.
        prompts: Token ids, one list a row, none empty.
        params: Settings, one a row.
        decoding: How to decode them.

    Raises:
        ValueError: A prompt is empty or too long, ids are outside the vocabulary, or there is no drafter to verify.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        decoding: Decoding = Decoding(),
    ):
        config = model.config
        check_requests(prompts, params, config.vocab_size, config.max_positions)
        block = model.drafter_config.block_size if model.drafter_config else 1
        self.verify_length = block if decoding.verify_length is None else decoding.verify_length
        if not 1 <= self.verify_length <= block:
            limit = f"1 to {block}, the drafter's block" if block > 1 else "1: this model has no drafter"
            raise ValueError(f"verify_length must be {limit}, not {self.verify_length}")
        self.model, self.prompts = model, [list(p) for p in prompts]
        # groups have equally many rows; those that are nobody's are never started
        groups = model.models.topology.data_parallel
        self._rows = -(-len(prompts) // groups) * groups
        idle = self._rows - len(prompts)
        asked = [*prompts, *[[0]] * idle], [*params, *[SamplingParams()] * idle]
        self.requests = model.placed(batch_requests(*asked, model.eos_ids, config.vocab_size))
        """Settings and limits, as programs take them."""

        longest = max(map(len, prompts))
        grown = max(len(p) + q.max_new_tokens for p, q in zip(prompts, params, strict=True))
        self.capacity = max(256, 1 << (grown - 1).bit_length())
        self._chunk = min(MAX_CHUNK, max(16, 1 << (longest - 1).bit_length()))
        self.state = model.empty_state(self._rows, self.capacity)
        """Caches and anchors, to look at or to run a round on by hand; every step takes it and leaves another."""
        self.active = np.zeros(len(prompts), bool)
        """[batch]: rows that go on."""
        statics = {
            "rounds": decoding.rounds_per_dispatch,
            "verify_length": self.verify_length,
            "sampled_drafts": decoding.sampled_drafts,
        }
        start = time.perf_counter()
        self._prefill = model.compiled(prefill, (self.state, self.requests, self._chunk_at(0)), {})
        self._decode = model.compiled(decode, (self.state, self.requests), statics)
        self.compile_seconds = time.perf_counter() - start

    def _chunk_at(self, start: int) -> PromptChunk:
        prompts = [*self.prompts, *[[]] * (self._rows - len(self.prompts))]
        parts = [p[start : start + self._chunk] for p in prompts]
        tokens: Any = np.array([p + [0] * (self._chunk - len(p)) for p in parts], np.int32)
        counts: Any = np.array(list(map(len, parts)), np.int32)
        last: Any = np.array([start < len(p) <= start + self._chunk for p in prompts])
        return self.model.placed(PromptChunk(tokens, counts, last))

    def prefill(self) -> Step:
        """Run all prompts, chunk by chunk; gives every row its first token."""
        begin = time.perf_counter()
        firsts: list[list[int]] = [[] for _ in self.prompts]
        for start in range(0, max(map(len, self.prompts)), self._chunk):
            done = self._run(self._prefill, self._chunk_at(start))
            for row, prompt in enumerate(self.prompts):
                if start < len(prompt) <= start + self._chunk:
                    firsts[row] = [int(done.tokens[row, 0])]
            self.active = done.active[: len(self.prompts)]
        return Step(firsts, None, time.perf_counter() - begin)

    def step(self) -> Step:
        """Dispatch rounds once; rows that finish stop, and the device stops early when all have."""
        begin = time.perf_counter()
        log = self._run(self._decode)
        rounds = jax.tree.map(lambda x: x[: log.ran, : len(self.prompts)], log)
        self.active = rounds.active[-1] if log.ran else np.zeros(len(self.prompts), bool)
        tokens = [
            [int(t) for done, n in zip(rounds.tokens[:, row], rounds.counts[:, row], strict=True) for t in done[:n]]
            for row in range(len(self.prompts))
        ]
        return Step(tokens, rounds, time.perf_counter() - begin)

    def stop(self, rows: Sequence[int]) -> None:
        """End rows that the host has seen enough of."""
        self.active = self.active.copy()
        self.active[list(rows)] = False
        going = np.pad(self.active, (0, self._rows - len(self.prompts)))
        spec = self.model.models.topology.spec(("batch",), going.shape)
        active = place(going, spec, self.model.mesh)
        self.state = replace(self.state, active=active)

    def _run(self, program: Callable, *arguments: PromptChunk) -> Rounds:
        """Run a program on the state; what it gives, on the host."""
        self.state, rounds = program(self.model.params, self.state, self.requests, *arguments)
        return jax.device_get(rounds)
