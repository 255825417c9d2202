"""Steps as arrays: what one compiled program is called with. NumPy only: processes can hand them on as bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mimo_jax.request import SamplingParams, batch_requests
from mimo_jax.slots import MAX_LOGIT_BIASES, MAX_STOP_IDS, Admission, Drafts, Masks, Rows, Saving
from mimo_jax.speculative import PromptChunk
from serve.engine.scheduler import Admit, Row, Save, Sizes

Program = Literal["admit", "prefill", "save", "decode", "draft", "verify"]


@dataclass(frozen=True)
class Bucket:
    """A program and the sizes it is compiled for."""

    program: Program
    rows: int
    """Of a data-parallel group."""
    tokens: int = 0
    """Of a prefill's chunk."""


@dataclass(frozen=True)
class Command:
    """One call of a program; arguments are dataclasses of NumPy arrays, and arrays."""

    bucket: Bucket
    arguments: tuple[Any, ...]


def row_sizes(most: int) -> tuple[int, ...]:
    """Numbers of rows that programs are compiled for: few, and none more than four times what is needed."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 4))
    return tuple(reversed(sizes))


def all_buckets(sizes: Sizes) -> list[Bucket]:
    """Every bucket that a scheduler's steps may need."""
    rows = row_sizes(sizes.slots)
    buckets = [Bucket("admit", 1), *(Bucket("prefill", *size) for size in sizes.prefills)]
    buckets += [Bucket("save", 1)] if sizes.snapshots else []
    buckets += [Bucket("decode", r) for r in rows]
    return buckets + [Bucket(program, r) for r in rows for program in ("draft", "verify")]


class CommandBuilder:
    """Makes commands from a scheduler's steps.

    Args:
        sizes: The scheduler's.
        vocab_size: Of the model's logits.
        eos_ids: The model's end-of-text tokens.
        columns: Pages that a sequence may have.
    """

    def __init__(self, sizes: Sizes, vocab_size: int, eos_ids: Sequence[int], columns: int) -> None:
        self.sizes, self.vocab_size, self.eos_ids, self.columns = sizes, vocab_size, eos_ids, columns
        self.words = -(-vocab_size // 32)

    def admit(self, admission: Admit | None) -> Command:
        """A sequence gets a slot; without one, none does."""
        groups, none = self.sizes.groups, self.sizes
        prompts: list[Sequence[int]] = [[]] * groups
        params = [SamplingParams()] * groups
        if admission:
            s = admission.sequence
            prompts[s.group], params[s.group] = s.request.prompt_ids, s.sampling
        requests = batch_requests(prompts, params, self.eos_ids, self.vocab_size, MAX_STOP_IDS, MAX_LOGIT_BIASES)
        wanted: Any = np.zeros(groups, bool)
        counts: Any = np.zeros((groups, self.vocab_size), np.int32)
        table: Any = np.zeros((groups, self.columns), np.int32)
        slots, saved, copy_from, copy_to, lengths, emitted = (
            np.full(groups, nothing, np.int32) for nothing in (none.slots, none.snapshots, none.pages, none.pages, 0, 0)
        )
        if admission:
            s, hit = admission.sequence, admission.hit
            wanted[s.group] = s.request.logprobs
            np.add.at(counts[s.group], np.asarray(s.tokens[s.prompt_length :], np.int64), 1)
            table[s.group, : len(s.pages)] = s.pages
            slots[s.group], emitted[s.group] = s.slot, s.emitted
            if hit:
                lengths[s.group], saved[s.group] = hit.length, hit.snapshot
            if hit and hit.tail is not None and admission.copy_to is not None:
                copy_from[s.group], copy_to[s.group] = hit.tail, admission.copy_to
        places: Any = (table, saved, copy_from, copy_to)
        given: Any = (slots, replace(requests, logprobs=wanted), lengths, emitted, counts)
        return Command(Bucket("admit", 1), (Admission(*given, *places),))

    def save(self, save: Save | None) -> Command:
        """The rings of a slot are kept; without one, none are."""
        slots: Any = np.full(self.sizes.groups, self.sizes.slots, np.int32)
        saved: Any = np.full(self.sizes.groups, self.sizes.snapshots, np.int32)
        if save:
            slots[save.group], saved[save.group] = save.slot, save.snapshot
        return Command(Bucket("save", 1), (Saving(slots, saved),))

    def prefill(self, rows: Sequence[Row], size: tuple[int, int], mask: Callable[[Row], Any]) -> tuple[Command, list]:
        """Chunks of prompts; also gives the sequence of every row of the program, or None.

        Args:
            rows: Of the step.
            size: Rows of a group, and tokens.
            mask: What the first token of a constrained row may be: [words] int32, or None.
        """
        bucket = Bucket("prefill", *size)
        taken, at, of = self._rows(rows, bucket)
        ids: Any = np.zeros((len(of), bucket.tokens), np.int32)
        counts: Any = np.zeros(len(of), np.int32)
        last: Any = np.zeros(len(of), bool)
        masks = self.no_masks(len(of), 1)
        for row, i in zip(rows, at, strict=True):
            ids[i, : row.count] = row.sequence.tokens[row.start : row.start + row.count]
            counts[i], last[i] = row.count, row.last
            if row.last and (words := mask(row)) is not None:
                masks[i, 0] = words
        return Command(bucket, (taken, PromptChunk(ids, counts, last), Masks(masks))), of

    def decode(self, rows: Sequence[Row], program: Literal["decode", "draft"] = "decode") -> tuple[Command, list]:
        """Rounds; or only the drafts of one."""
        bucket = Bucket(program, self._wide(rows))
        taken, _, of = self._rows(rows, bucket)
        return Command(bucket, (taken,)), of

    def verify(self, rows: Sequence[Row], drafts: Any, masks: Any) -> tuple[Command, list]:
        """The rest of a round whose drafts [rows of the program, verify_length - 1] are known, under masks."""
        bucket = Bucket("verify", self._wide(rows))
        taken, _, of = self._rows(rows, bucket)
        return Command(bucket, (taken, Drafts(drafts), Masks(masks))), of

    def template(self, bucket: Bucket) -> tuple[Any, ...]:
        """Arguments of the right shapes that ask for nothing."""
        match bucket.program:
            case "admit":
                return self.admit(None).arguments
            case "save":
                return self.save(None).arguments
            case "prefill":
                return self.prefill([], (bucket.rows, bucket.tokens), lambda _: None)[0].arguments
            case "verify":
                batch, length = bucket.rows * self.sizes.groups, self.sizes.verify_length
                drafts: Any = np.zeros((batch, length - 1), np.int32)
                return self._rows([], bucket)[0], Drafts(drafts), Masks(self.no_masks(batch, length))
            case "decode" | "draft":
                return (self._rows([], bucket)[0],)

    def no_masks(self, batch: int, rows: int) -> Any:
        """Masks [batch, rows, words] that allow everything."""
        return np.full((batch, rows, self.words), -1, np.int32)

    def _wide(self, rows: Sequence[Row]) -> int:
        """The smallest number of a group's rows that is compiled for and holds these."""
        most = max(sum(row.group == g for row in rows) for g in range(self.sizes.groups))
        return min(size for size in row_sizes(self.sizes.slots) if size >= most)

    def _rows(self, rows: Sequence[Row], bucket: Bucket) -> tuple[Rows, list[int], list]:
        """Rows as arrays with the groups one after another, where each row is, and whose every row is."""
        batch = bucket.rows * self.sizes.groups
        positions = bucket.tokens or (
            self.sizes.round_tokens if bucket.program == "decode" else self.sizes.verify_length
        )
        most = -(-positions // self.sizes.page_size) + 1  # they may begin and end inside a page
        slots: Any = np.full(batch, self.sizes.slots, np.int32)
        first: Any = np.zeros(batch, np.int32)
        pages: Any = np.full((batch, most), -1, np.int32)
        of: list = [None] * batch
        at, used = [], [0] * self.sizes.groups
        for row in rows:
            i = row.group * bucket.rows + used[row.group]
            used[row.group] += 1
            at.append(i)
            of[i] = row.sequence
            slots[i], first[i] = row.slot, row.first_page
            pages[i, : len(row.pages)] = row.pages
        return Rows(slots, first, pages), at, of
