"""What the devices do next: which requests get slots and pages, whose prompt is computed, who decodes.

The scheduler plans without knowing the results of what is still in flight. It reckons with the most positions that
those steps can have added; a row that has finished in the meantime is simply not active on the device. Programs run in
the order in which they were planned, so a page or a slot that is given on was read and written by its old owner before.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from serve.engine.pages import PagePool
from serve.engine.prefix_cache import Hit, PrefixCache
from serve.engine.sequence import Sequence, Stage
from serve.generation import Load


@dataclass(frozen=True)
class Sizes:
    """What the devices have room for; of one data-parallel group, where there are several."""

    groups: int
    slots: int
    pages: int
    page_size: int
    snapshots: int
    slack: int
    """Tokens by which a sequence may be shorter than the rings it begins from (see `PrefixCache`)."""
    verify_length: int
    rounds: int
    """Of a decode step."""
    prefills: tuple[tuple[int, int], ...]
    """(rows, tokens) of a prefill step that programs exist for, by rising tokens, then rows."""

    @property
    def round_tokens(self) -> int:
        """Positions that a decode step may add."""
        return self.rounds * self.verify_length


@dataclass(frozen=True)
class Admit:
    """A sequence gets a slot."""

    sequence: Sequence
    hit: Hit | None
    copy_to: int | None
    """The page that becomes its own copy of the hit's tail."""


@dataclass(frozen=True)
class Save:
    """The rings of a slot are kept."""

    group: int
    slot: int
    snapshot: int


@dataclass(frozen=True)
class Row:
    """A sequence takes part in a program, with pages that it got for it."""

    sequence: Sequence
    first_page: int
    pages: list[int]
    start: int = 0
    """Of a prefill: the first position."""
    count: int = 0
    last: bool = False
    slot: int = field(init=False)
    group: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slot", self.sequence.slot)
        object.__setattr__(self, "group", self.sequence.group)


@dataclass
class Step:
    """What is to be dispatched, in this order."""

    kept: list[Save] = field(default_factory=list)
    """Of sequences that have finished."""
    admissions: list[Admit] = field(default_factory=list)
    prefill: list[Row] = field(default_factory=list)
    prefill_size: tuple[int, int] = (0, 0)
    """(rows of a group, tokens) of its program."""
    saves: list[Save] = field(default_factory=list)
    """Of what the prefill computed."""
    decode: list[Row] = field(default_factory=list)
    constrained: list[Row] = field(default_factory=list)
    """Rows whose drafts the host has to see: one round."""

    def __bool__(self) -> bool:
        return bool(self.kept or self.admissions or self.prefill or self.decode or self.constrained)


class Scheduler:
    """The queue, and who has which slot and pages.

    Args:
        sizes: What there is room for.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Those that have slots, by arrival."""
        self.retractions = 0
        """How often a sequence lost its slot because pages ran short."""
        self._slots = [list(range(sizes.slots))[::-1] for _ in range(sizes.groups)]
        self._pools = [PagePool(sizes.pages) for _ in range(sizes.groups)]
        self._caches = [PrefixCache(pool, sizes.page_size, sizes.snapshots, sizes.slack) for pool in self._pools]
        self._kept: list[Save] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.tokens.extend(sequence.request.prompt_ids)
        self.waiting.append(sequence)

    def plan(self) -> Step:
        """The next step; empty if there is nothing to do until a result comes."""
        step = Step(kept=self._kept)
        self._kept = []
        # who decodes comes first: newcomers get what is left
        self._plan_decode(step)
        self._admit(step)
        self._plan_prefill(step)
        return step

    def finish(self, sequence: Sequence, exact: bool) -> None:
        """A sequence is over; its slot and pages are free.

        Args:
            sequence: Wherever it is.
            exact: Whether the device holds precisely its tokens but for the last, so that a longer prompt may begin
                with them.
        """
        if sequence.stage is Stage.FINISHED:
            return
        if sequence.stage is Stage.WAITING:
            self.waiting.remove(sequence)
        else:
            if exact and sequence.stage is Stage.RUNNING and sequence.emitted:
                self._keep(sequence, len(sequence.tokens) - 1, self._kept)
            self._leave(sequence)
        sequence.stage = Stage.FINISHED

    def flush(self) -> bool:
        """Forget all prefixes; False, and nothing is done, if there are requests."""
        if self.running or self.waiting:
            return False
        for cache in self._caches:
            cache.clear()
        self._kept.clear()
        return True

    def load(self) -> Load:
        """How busy it is."""
        size, groups = self.sizes.page_size, self.sizes.groups
        free = sum(pool.free for pool in self._pools)
        held = sum(cache.held_pages for cache in self._caches)
        return Load(
            running=len(self.running),
            waiting=len(self.waiting),
            slots=self.sizes.slots * groups,
            used_tokens=(self.sizes.pages * groups - free - held) * size,
            total_tokens=self.sizes.pages * groups * size,
            cached_tokens=held * size,
            snapshots=sum(cache.used_snapshots for cache in self._caches),
            total_snapshots=self.sizes.snapshots * groups,
        )

    def check(self) -> None:
        """Raise `IntegrityError` or `AssertionError` unless everything is owned exactly once."""
        for pool, cache in zip(self._pools, self._caches, strict=True):
            pool.check()
            cache.check()
        for group, free in enumerate(self._slots):
            owned = [s.slot for s in self.running if s.group == group]
            assert sorted([*free, *owned]) == list(range(self.sizes.slots)), "a slot is lost or owned twice"
        assert all(s.stage is Stage.WAITING and not s.pages for s in self.waiting), "a waiting sequence owns pages"
        if not self.running:
            idle = [pool.free + cache.held_pages for pool, cache in zip(self._pools, self._caches, strict=True)]
            assert idle == [self.sizes.pages] * self.sizes.groups, "pages are lost"

    def _plan_decode(self, step: Step) -> None:
        for sequence in [s for s in self.running if s.stage is Stage.RUNNING]:
            if sequence.stage is not Stage.RUNNING:  # put off for the sake of an earlier one
                continue
            constrained = sequence.constraint is not None
            if constrained and sequence.in_flight:
                continue
            rounds = 1 if constrained else self.sizes.rounds
            most = sequence.committed + (sequence.rounds_in_flight + rounds) * self.sizes.verify_length
            later = (s for s in reversed(self.running) if s.arrival >= sequence.arrival)
            row = self._grown(sequence, min(most, sequence.longest), later)
            if row is None:
                continue
            sequence.in_flight += 1
            sequence.rounds_in_flight += rounds
            (step.constrained if constrained else step.decode).append(row)

    def _grown(self, sequence: Sequence, positions: int, victims: Iterator[Sequence]) -> Row | None:
        """Pages for a sequence's first positions; if there are too few, victims of its group lose theirs one by one.

        None if there are not enough even so, or if it was a victim itself. Pages are seldom short and rows are many, so
        nobody looks for victims before.
        """
        pool, cache = self._pools[sequence.group], self._caches[sequence.group]
        first = len(sequence.pages)
        short = max(-(-positions // self.sizes.page_size) - first, 0)
        while (pages := pool.allocate(short)) is None:
            if cache.evict(short):
                continue
            victim = next((s for s in victims if s.group == sequence.group), None)
            if victim is None:
                return None
            self._retract(victim)
            if victim is sequence:
                return None
        sequence.pages += pages
        return Row(sequence, first, pages)

    def _retract(self, sequence: Sequence) -> None:
        """Put a sequence off: it begins again with all its tokens as the prompt, once pages are free."""
        self.retractions += 1
        self._leave(sequence)
        sequence.stage = Stage.WAITING
        sequence.planned = 0
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._pools[sequence.group].release(sequence.pages)
        self._slots[sequence.group].append(sequence.slot)
        self.running.remove(sequence)
        sequence.pages, sequence.slot = [], -1

    def _admit(self, step: Step) -> None:
        for sequence in list(self.waiting):
            if not any(self._slots):
                return
            if sequence.in_flight:
                return  # what it has is not all known yet; those behind it do not overtake
            leader = sequence.leader
            if leader is not None and not leader.prefilled and leader.stage is not Stage.FINISHED:
                continue
            if not self._seat(sequence, step):
                return

    def _seat(self, sequence: Sequence, step: Step) -> bool:
        """Give a sequence a slot where it finds most of its tokens, and then most room; False if there is no room."""
        size, limit = self.sizes.page_size, len(sequence.tokens) - 1
        hits = {g: self._caches[g].match(sequence.tokens, limit) for g, free in enumerate(self._slots) if free}
        order = sorted(hits, key=lambda g: (h.length if (h := hits[g]) else 0, self._room(g)), reverse=True)
        for group in order[1:]:
            self._give_up(group, hits[group])
        group, hit = order[0], hits[order[0]]
        length = hit.length if hit else 0
        pool, cache = self._pools[group], self._caches[group]
        # enough for its tokens and a step, and for a page each of those that run
        ahead = min(len(sequence.tokens) + self.sizes.round_tokens, sequence.longest)
        need = -(-ahead // size) - length // size
        others = sum(s.group == group for s in self.running)
        if pool.free < need + others and not cache.evict(need + others) and (others or not cache.evict(need)):
            self._give_up(group, hit)
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.arrival)
        sequence.group, sequence.slot = group, self._slots[group].pop()
        sequence.pages = list(hit.pages) if hit else []
        copy_to = None
        if hit and hit.tail is not None:
            copied = pool.allocate(1)
            assert copied is not None, "there was room"
            copy_to = copied[0]
            sequence.pages.append(copy_to)
        if hit:
            cache.unpin(hit)
        if not sequence.admitted:
            sequence.cached, sequence.admitted = length, True
        sequence.stage, sequence.planned, sequence.target = Stage.PREFILL, length, len(sequence.tokens)
        step.admissions.append(Admit(sequence, hit, copy_to))
        return True

    def _give_up(self, group: int, hit: Hit | None) -> None:
        if hit:
            self._caches[group].unpin(hit)
            self._pools[group].release(hit.pages)

    def _room(self, group: int) -> int:
        return self._pools[group].free + self._caches[group].held_pages

    def _plan_prefill(self, step: Step) -> None:
        ready = [s for s in self.running if s.stage is Stage.PREFILL]
        if not ready:
            return
        # of the programs that get furthest with the prompts the smallest
        tokens = max(sorted({t for _, t in self.sizes.prefills}), key=lambda tokens: self._progress(ready, tokens))
        rows = [r for r, t in self.sizes.prefills if t == tokens]
        for sequence in ready:
            mine = sum(row.group == sequence.group for row in step.prefill)
            if sequence.stage is not Stage.PREFILL or mine == max(rows):
                continue
            count = min(tokens, sequence.target - sequence.planned)
            # those that decode have their part in this step already
            later = (s for s in reversed(ready) if s.stage is Stage.PREFILL and s.arrival > sequence.arrival)
            row = self._grown(sequence, sequence.planned + count, later)
            if row is not None:
                last = sequence.planned + count == sequence.target
                step.prefill.append(Row(sequence, row.first_page, row.pages, sequence.planned, count, last))
        step.admissions = [a for a in step.admissions if a.sequence.stage is Stage.PREFILL]
        most = max((sum(row.group == g for row in step.prefill) for g in range(self.sizes.groups)), default=0)
        step.prefill_size = min(r for r in rows if r >= most), tokens
        for row in step.prefill:
            sequence = row.sequence
            sequence.planned += row.count
            self._keep(sequence, sequence.planned, step.saves)
            if row.last:
                sequence.stage, sequence.prefilled = Stage.RUNNING, True
                sequence.in_flight += 1

    def _progress(self, ready: list[Sequence], tokens: int) -> int:
        """Prompt tokens that a step with chunks of this size would compute."""
        rows = max(r for r, t in self.sizes.prefills if t == tokens)
        taken = [s for g in range(self.sizes.groups) for s in [s for s in ready if s.group == g][:rows]]
        return sum(min(tokens, s.target - s.planned) for s in taken)

    def _keep(self, sequence: Sequence, length: int, saves: list[Save]) -> None:
        snapshot = self._caches[sequence.group].insert(sequence.tokens[:length], sequence.pages)
        if snapshot is not None:
            saves.append(Save(sequence.group, sequence.slot, snapshot))
