"""The prefix cache against a plain list of snapshots, with sequences that really write their pages and rings."""

from array import array
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from serve.engine.pages import PagePool
from serve.engine.prefix_cache import Hit, PrefixCache

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Saved:
    """What the model knows of a snapshot: the slot on the device, and the tokens whose rings were saved."""

    tokens: Tokens
    slot: int
    tail: int | None
    pins: int = 0


@dataclass(eq=False)
class Sequence:
    tokens: list[int]
    pages: list[int] = field(default_factory=list)


class Device:
    """Pages that hold (position, token), and rings that hold the last of a sequence's tokens."""

    def __init__(self, pages: int, page_size: int, snapshots: int) -> None:
        self.page_size = page_size
        self.pages: list[list[tuple[int, int] | None]] = [[None] * page_size for _ in range(pages)]
        self.snapshots: list[Tokens | None] = [None] * snapshots

    def write(self, sequence: Sequence, start: int) -> None:
        for position in range(start, len(sequence.tokens)):
            page = sequence.pages[position // self.page_size]
            self.pages[page][position % self.page_size] = (position, sequence.tokens[position])

    def read(self, pages: list[int], length: int) -> list[tuple[int, int] | None]:
        return [self.pages[pages[position // self.page_size]][position % self.page_size] for position in range(length)]


def common(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


PIECES = [(0,), (1,), (0, 1), (1, 1, 0), (0,) * 8, (1, 0) * 8, (1, 1, 0, 0, 0) * 5]
TEXT = st.lists(st.sampled_from(PIECES), max_size=4).map(lambda pieces: sum(pieces, ()))


class Machine(RuleBasedStateMachine):
    page_size = 3

    @initialize(
        positions=st.integers(60, 400),
        snapshots=st.sampled_from([0, 1, 2, 4, 8]),
        slack=st.sampled_from([0, 1, 2, 8, 40]),
    )
    def start(self, positions, snapshots, slack):
        pages = -(-positions // self.page_size)
        self.slack, self.slots = slack, snapshots
        self.pool = PagePool(pages)
        self.cache = PrefixCache(self.pool, self.page_size, snapshots, slack)
        self.device = Device(pages, self.page_size, snapshots)
        self.sequences: list[Sequence] = []
        self.pending: list[tuple[Tokens, Hit, Saved]] = []
        self.saved: list[Saved] = []  # least recently used first
        self.seen: list[Tokens] = [()]
        self.tree: dict[Tokens, int] = {}  # full pages of tokens from the beginning -> the page of the last of them

    # What the cache should say.

    def touch(self, saved: Saved) -> None:
        self.saved.remove(saved)
        self.saved.append(saved)

    def drop(self, saved: Saved) -> None:
        self.saved.remove(saved)
        self.forget_unneeded()

    def forget_unneeded(self) -> None:
        self.tree = {
            tokens: page
            for tokens, page in self.tree.items()
            if any(saved.tokens[: len(tokens)] == tokens for saved in self.saved)
        }

    def prefixes(self, tokens: Tokens) -> list[Tokens]:
        return [tokens[:end] for end in range(self.page_size, len(tokens) + 1, self.page_size)]

    def cached_pages(self) -> set[int]:
        return {*self.tree.values(), *(saved.tail for saved in self.saved if saved.tail is not None)}

    def sequence_pages(self) -> set[int]:
        return {page for s in self.sequences for page in s.pages} | {p for _, hit, _ in self.pending for p in hit.pages}

    def free(self) -> int:
        return self.pool.total - len(self.cached_pages() | self.sequence_pages())

    # What sequences do.

    def prompt(self, data) -> Tokens:
        """Something new, or something like what was seen before."""
        old = data.draw(st.sampled_from(self.seen))
        cut = data.draw(st.one_of(st.sampled_from([0, 0, 1, 2, 8]), st.integers(0, len(old))))
        return old[: max(0, len(old) - cut)] + data.draw(TEXT) or (0,)

    @rule(data=st.data())
    def match(self, data):
        prompt = self.prompt(data)
        limit = data.draw(st.one_of(st.just(len(prompt) - 1), st.integers(-1, len(prompt) + 2)))
        hit = self.cache.match(data.draw(st.sampled_from([list, tuple, lambda t: array("i", t)]))(prompt), limit)
        usable = {
            end: [s for s in self.saved if s.tokens[:end] == prompt[:end] and 0 <= len(s.tokens) - end <= self.slack]
            for end in range(1, min(limit, len(prompt)) + 1)
        }
        best = max((end for end, serving in usable.items() if serving), default=0)
        assert (0 if hit is None else hit.length) == best
        if hit is not None:
            saved = next(s for s in usable[best] if s.slot == hit.snapshot)
            self.touch(saved)
            saved.pins += 1
            self.pending.append((prompt, hit, saved))
            full = best // self.page_size
            assert list(hit.pages) == [self.tree[tokens] for tokens in self.prefixes(prompt)[:full]]
            assert (hit.tail is None) == (best % self.page_size == 0)
        else:
            self.begin(prompt)

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def begin_from_hit(self, data):
        """Copy what a hit calls for, and compute the rest of the prompt; or give up, if there is no room."""
        prompt, hit, saved = self.pending[data.draw(st.integers(0, len(self.pending) - 1))]
        count = -(-len(prompt) // self.page_size) - len(hit.pages)
        pages = self.allocate(count)
        self.pending = [waiting for waiting in self.pending if waiting[1] is not hit]
        saved.pins -= 1
        if pages is None:
            self.pool.release(hit.pages)
        else:
            rings = self.device.snapshots[hit.snapshot]
            assert rings is not None
            assert hit.length <= len(rings) <= hit.length + self.slack
            assert rings[: hit.length] == prompt[: hit.length]
            sequence = Sequence(list(prompt), [*hit.pages, *pages])
            if hit.tail is not None:
                assert hit.tail not in pages
                self.device.pages[pages[0]] = list(self.device.pages[hit.tail])
            assert self.device.read(sequence.pages, hit.length) == list(enumerate(prompt[: hit.length]))
            self.device.write(sequence, hit.length)
            self.sequences.append(sequence)
        self.cache.unpin(hit)

    def begin(self, prompt: Tokens) -> None:
        """Compute the whole prompt, if there is room."""
        pages = self.allocate(-(-len(prompt) // self.page_size))
        if pages is not None:
            self.sequences.append(Sequence(list(prompt), pages))
            self.device.write(self.sequences[-1], 0)
            self.save(self.sequences[-1], len(prompt))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=TEXT)
    def append(self, data, tokens):
        sequence = data.draw(st.sampled_from(self.sequences))
        length = len(sequence.tokens)
        pages = self.allocate(-(-(length + len(tokens)) // self.page_size) - len(sequence.pages))
        if pages is not None:
            sequence.pages.extend(pages)
            sequence.tokens.extend(tokens)
            self.device.write(sequence, length)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), short=st.sampled_from([0, 0, 0, 1, 5, 1000]), more=st.integers(0, 1))
    def insert(self, data, short, more):
        """Save a sequence as it is, or (`short`) as it was some tokens ago."""
        sequence = data.draw(st.sampled_from(self.sequences))
        self.save(sequence, max(0, len(sequence.tokens) - short), more)

    def save(self, sequence: Sequence, length: int, more: int = 0) -> None:
        tokens = tuple(sequence.tokens[:length])
        needed = -(-len(tokens) // self.page_size)
        slot = self.cache.insert(tokens, sequence.pages[: needed + more])
        same = next((saved for saved in self.saved if saved.tokens == tokens), None)
        unpinned = [saved for saved in self.saved if not saved.pins]
        if same is not None:
            assert slot is None
            self.touch(same)
        elif not tokens or (len(self.saved) == self.slots and not unpinned):
            assert slot is None
        else:
            assert slot is not None
            if len(self.saved) == self.slots:
                assert slot == unpinned[0].slot
                self.saved.remove(unpinned[0])
            assert slot not in [saved.slot for saved in self.saved]
            partial = len(tokens) % self.page_size
            self.saved.append(Saved(tokens, slot, sequence.pages[needed - 1] if partial else None))
            for prefix, page in zip(self.prefixes(tokens), sequence.pages, strict=False):
                self.tree.setdefault(prefix, page)
            self.forget_unneeded()
            self.device.snapshots[slot] = tokens
            self.seen.append(tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data):
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.pool.release(sequence.pages)

    @precondition(lambda self: self.saved)
    @rule(more=st.integers(0, 8))
    def evict_some(self, more):
        self.evict(self.free() + more)

    def evict(self, free: int) -> None:
        before = list(self.saved), dict(self.tree)
        while self.free() < free and (unpinned := [saved for saved in self.saved if not saved.pins]):
            self.drop(unpinned[0])
        possible = self.free() >= free
        if not possible:
            self.saved, self.tree = before
        assert self.cache.evict(free) == possible

    @precondition(lambda self: len(self.saved) > 2)
    @rule()
    def clear(self):
        self.cache.clear()
        for saved in [saved for saved in self.saved if not saved.pins]:
            self.drop(saved)

    def allocate(self, count: int) -> list[int] | None:
        used = self.cached_pages() | self.sequence_pages()
        pages = self.pool.allocate(count)
        if pages is None:
            self.evict(count)
            used = self.cached_pages() | self.sequence_pages()
            pages = self.pool.allocate(count)
            assert (pages is not None) == (self.pool.total - len(used) >= count)
        for page in pages or []:
            assert page not in used
            self.device.pages[page] = [None] * self.page_size
        return pages

    # What must hold whatever they did.

    @invariant()
    def books_agree(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        assert self.pool.free == self.free()
        assert self.cache.held_pages == len(self.cached_pages() - self.sequence_pages())
        assert self.cache.used_snapshots == len(self.saved)

    @invariant()
    def contents_are_intact(self):
        for sequence in getattr(self, "sequences", []):
            length = len(sequence.tokens)
            assert self.device.read(sequence.pages, length) == list(enumerate(sequence.tokens))
        for saved in getattr(self, "saved", []):
            pages = [self.tree[prefix] for prefix in self.prefixes(saved.tokens)]
            pages += [saved.tail] if saved.tail is not None else []
            assert self.device.read(pages, len(saved.tokens)) == list(enumerate(saved.tokens))
            assert self.device.snapshots[saved.slot] == saved.tokens

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for sequence in self.sequences:
            self.pool.release(sequence.pages)
        for _, hit, _ in self.pending:
            self.pool.release(hit.pages)
            self.cache.unpin(hit)
        self.cache.clear()
        self.cache.check()
        assert self.pool.free == self.pool.total
        assert (self.cache.held_pages, self.cache.used_snapshots) == (0, 0)


class MachineOfSinglePositions(Machine):
    page_size = 1


class MachineOfWidePages(Machine):
    page_size = 16


STEPS = settings(max_examples=150, stateful_step_count=50, deadline=None)
SOAK = settings(max_examples=300, stateful_step_count=80, deadline=None)

MACHINES = (MachineOfSinglePositions, Machine, MachineOfWidePages)


@pytest.mark.parametrize("machine", MACHINES)
def test_against_plain_lists(machine):
    run_state_machine_as_test(machine, settings=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_against_plain_lists_for_longer(machine):
    run_state_machine_as_test(machine, settings=SOAK)
