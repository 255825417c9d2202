"""What earlier sequences computed, found again by their tokens.

Full-attention pages of a prefix can be shared at any length. The rings of SWA layers and of the drafter cannot: they
remember only the last positions, so a sequence can start after a prefix only where a snapshot of the rings was saved.
The rings have `slack` slots more than their readers need; a snapshot taken at length L therefore serves any length from
L - slack to L.

The tree has a node for each full page of a snapshot's tokens. What a snapshot has beyond its last full page, it keeps
itself, with the page that the sequence went on to fill: sequences only append, so the positions below L stay as they
were. Each length that a snapshot serves is an entry in the node of the last full page before it, under the tokens
between. A match walks down by whole pages and looks, on its way back up, for the longest entry that fits.

Tokens are packed into bytes: a page's are hashed and compared at once, and take four bytes each.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serve.engine.pages import IntegrityError, PagePool

_TOKEN_BYTES = array("i").itemsize


@dataclass(frozen=True)
class Hit:
    """A prefix that need not be computed again."""

    length: int
    """Positions the new sequence need not compute."""
    pages: tuple[int, ...]
    """Its full pages, length // page_size of them; whoever asked owns one reference to each."""
    tail: int | None
    """The page to copy into the sequence's next page, if the length ends inside one."""
    snapshot: int
    """The slot to restore the rings from."""


@dataclass(eq=False, slots=True)
class _Node:
    """One full page of tokens after those of its parent; the root stands for no tokens and has no page."""

    parent: "_Node | None"
    tokens: bytes
    page: int
    depth: int
    children: "dict[bytes, _Node]" = field(default_factory=dict)
    snapshots: "dict[bytes, _Snapshot]" = field(default_factory=dict)
    """Those with no further full page, by their remaining tokens."""
    entries: "dict[bytes, dict[int, _Snapshot]]" = field(default_factory=dict)
    """For the tokens after this node that a hit may end with: the snapshots that serve it, by slot."""


@dataclass(eq=False, slots=True)
class _Snapshot:
    slot: int
    length: int
    node: _Node
    tail: bytes
    """Tokens after the node's."""
    tail_page: int | None
    """Holds the tail; None if there is none."""


class PrefixCache:
    """Finds the longest reusable prefix of a prompt, and decides what is kept for later prompts.

    It only keeps books. The device copies that it calls for (rings into and out of snapshots, a tail page into a
    fresh one) must run in the order in which `match` and `insert` called for them. A match costs O(its tokens), an
    insert O(its tokens), an eviction O(pages that only the evicted snapshot needed).

    Args:
        pool: Of the pages that sequences hand in; no other cache may use it.
        page_size: Positions a page holds.
        snapshots: Slots for ring snapshots on the device; with 0 nothing is ever kept.
        slack: How many positions short of its length a snapshot can still be used at: the drafter's block size.
    """

    def __init__(self, pool: PagePool, page_size: int, snapshots: int, slack: int) -> None:
        for name, value, least in (("page_size", page_size, 1), ("snapshots", snapshots, 0), ("slack", slack, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        self._pool = pool
        self.page_size = page_size
        self._page_bytes = page_size * _TOKEN_BYTES
        self._slots = snapshots
        self._slack = slack
        self._root = _Node(None, b"", -1, 0)
        self._free_slots = list(range(snapshots - 1, -1, -1))
        self._used: OrderedDict[int, _Snapshot] = OrderedDict()  # by slot, least recently used first
        self._pins: Counter[int] = Counter()  # by slot; nothing with zero pins is in it

    @property
    def held_pages(self) -> int:
        """Pages that only the cache holds."""
        return self._pool.idle

    @property
    def used_snapshots(self) -> int:
        """Slots that hold a snapshot."""
        return len(self._used)

    def match(self, tokens: Sequence[int], limit: int) -> Hit | None:
        """Find the longest usable prefix.

        The caller gets a reference to each full page, and must `unpin` the hit once the copies it needs are planned.

        Args:
            tokens: A prompt. An `array("i")` is packed fastest.
            limit: Longest hit that is of use; for a prompt whose last token must still run, its length - 1.

        Returns:
            None if no snapshot serves any prefix.
        """
        if limit <= 0 or not self._used:
            return None
        packed = _pack(tokens[:limit])
        path = self._walk(packed)
        while path:
            node = path.pop()
            if node.entries:
                start = node.depth * self._page_bytes
                after = packed[start : start + self._page_bytes - 1]  # a whole page more would be a child's entry
                for length in range(len(after) // _TOKEN_BYTES, -1, -1):
                    found = node.entries.get(after[: length * _TOKEN_BYTES])
                    if found is not None:
                        path.append(node)
                        return self._hit(path, length, found[next(reversed(found))])
        return None

    def unpin(self, hit: Hit) -> None:
        """Let the hit's snapshot and tail page be evicted again; its full pages stay with the caller."""
        if not self._pins[hit.snapshot]:
            raise IntegrityError(f"the hit on snapshot {hit.snapshot} is not pinned; each hit is unpinned once")
        self._pins[hit.snapshot] -= 1
        if not self._pins[hit.snapshot]:
            del self._pins[hit.snapshot]

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> int | None:
        """Keep what a sequence has computed, and a snapshot of its rings as they are at this length.

        Where the tree has a page for the same tokens already, that one stays and the sequence's own is not kept.

        Args:
            tokens: Of positions 0 onward, all committed.
            pages: The sequence's, in order; those beyond the tokens are ignored.

        Returns:
            The slot to save the rings into, before anything else that is planned from now on; the least recently
            used snapshot that is not pinned made room where no slot was free. None where nothing is to be saved: the
            same tokens have a snapshot (which now counts as used), or every slot is pinned, or there are none.
        """
        needed = -(-len(tokens) // self.page_size)
        if len(pages) < needed:
            raise ValueError(
                f"{len(tokens)} tokens lie in {needed} pages of {self.page_size}, of which {len(pages)} were given"
            )
        if not len(tokens) or not self._slots:
            return None
        packed = _pack(tokens)
        node = self._walk(packed)[-1]
        full = len(tokens) // self.page_size
        tail = packed[full * self._page_bytes :]
        if node.depth == full and (same := node.snapshots.get(tail)) is not None:
            self._used.move_to_end(same.slot)
            return None
        evicted = None
        if not self._free_slots:
            evicted = self._oldest()
            if evicted is None:
                return None
            self._forget(evicted)
        while node.depth < full:
            start = node.depth * self._page_bytes
            child = _Node(node, packed[start : start + self._page_bytes], pages[node.depth], node.depth + 1)
            self._pool.cache(child.page)
            node.children[child.tokens] = child
            node = child
        slot = self._free_slots.pop()
        self._remember(_Snapshot(slot, len(tokens), node, tail, pages[full] if tail else None))
        if evicted is not None:  # only now: the new snapshot may need the same nodes
            self._prune(evicted.node)
        return slot

    def evict(self, free: int) -> bool:
        """Drop least recently used snapshots that are not pinned, and the pages only they need.

        Args:
            free: Pages that shall be free in the pool.

        Returns:
            False, with nothing dropped, if as many cannot be had.
        """
        if self._pool.free >= free:
            return True
        reachable = self._pool.free + self._pool.idle
        if reachable < free or reachable - self._pinned_pages() < free:
            return False
        while self._pool.free < free:
            oldest = self._oldest()
            if oldest is None:
                raise IntegrityError(f"everything was evicted, and {self._pool.free} pages are free instead of {free}")
            self._drop(oldest)
        return True

    def clear(self) -> None:
        """Drop everything that is not pinned."""
        for snapshot in list(self._used.values()):
            if snapshot.slot not in self._pins:
                self._drop(snapshot)

    def check(self) -> None:
        """Compare everything with everything, the pool included.

        Raises:
            IntegrityError: Something does not fit.
        """
        self._pool.check()
        if sorted([*self._free_slots, *self._used]) != list(range(self._slots)):
            raise IntegrityError("a snapshot slot is free and used, or neither")
        if any(slot not in self._used or pins < 1 for slot, pins in self._pins.items()):
            raise IntegrityError(f"pins {dict(self._pins)} on snapshots {list(self._used)}")
        nodes = list(self._nodes())
        references = Counter(node.page for node in nodes if node is not self._root)
        references.update(s.tail_page for s in self._used.values() if s.tail_page is not None)
        counted = {page: self._pool.cached(page) for page in range(self._pool.total) if self._pool.cached(page)}
        if references != counted:
            raise IntegrityError(f"the cache refers to pages {dict(references)}; the pool counted {counted}")
        found = [snapshot for node in nodes for snapshot in node.snapshots.values()]
        if len(found) != len(self._used) or any(self._used.get(s.slot) is not s for s in found):
            raise IntegrityError("the snapshots in the tree are not those in use")
        entries = {(id(node), after, s.slot) for s in found for node, after in self._entries_of(s)}
        held = [(id(node), after, slot) for node in nodes for after, by in node.entries.items() for slot in by]
        if len(held) != len(entries) or set(held) != entries or any(not by for n in nodes for by in n.entries.values()):
            raise IntegrityError("the lengths that the tree can serve are not those of its snapshots")

    def _nodes(self) -> Iterator[_Node]:
        """All nodes, each compared with its parent and with what it holds."""
        waiting = [self._root]
        while waiting:
            node = waiting.pop()
            if node is not self._root and not node.children and not node.snapshots:
                raise IntegrityError(f"no snapshot needs page {node.page}, and the cache keeps it")
            for tokens, child in node.children.items():
                if child.parent is not node or child.tokens != tokens or child.depth != node.depth + 1:
                    raise IntegrityError(f"the node of page {child.page} hangs in the wrong place")
                if len(tokens) != self._page_bytes:
                    raise IntegrityError(f"the node of page {child.page} is not of a whole page")
            for tail, s in node.snapshots.items():
                length = node.depth * self.page_size + len(tail) // _TOKEN_BYTES
                if (s.node, s.tail, s.length, s.tail_page is None) != (node, tail, length, not tail):
                    raise IntegrityError(f"snapshot {s.slot} hangs in the wrong place")
            waiting.extend(node.children.values())
            yield node

    def _walk(self, packed: bytes) -> list[_Node]:
        """The nodes for as many full pages of the tokens as the tree has, from the root on."""
        node, path, size = self._root, [self._root], self._page_bytes
        for start in range(0, len(packed) - size + 1, size):
            child = node.children.get(packed[start : start + size])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _hit(self, path: list[_Node], beyond: int, snapshot: _Snapshot) -> Hit:
        """Hand out the nodes of a path, and of the next page the first `beyond` tokens."""
        depth = path[-1].depth
        pages = tuple(node.page for node in path[1:])
        for page in pages:
            self._pool.retain(page)
        tail = None
        if beyond:
            tail, node = snapshot.tail_page, snapshot.node
            while node.depth > depth:
                assert node.parent is not None
                tail, node = node.page, node.parent
        self._pins[snapshot.slot] += 1
        self._used.move_to_end(snapshot.slot)
        return Hit(depth * self.page_size + beyond, pages, tail, snapshot.slot)

    def _entries_of(self, snapshot: _Snapshot) -> Iterator[tuple[_Node, bytes]]:
        """Where a snapshot can be found: for each length it serves, the node before and the tokens between."""
        node, after = snapshot.node, snapshot.tail
        for length in range(snapshot.length, max(0, snapshot.length - self._slack - 1), -1):
            beyond = length - node.depth * self.page_size
            if beyond < 0:
                assert node.parent is not None
                node, after = node.parent, node.tokens
                beyond += self.page_size
            yield node, after[: beyond * _TOKEN_BYTES]

    def _remember(self, snapshot: _Snapshot) -> None:
        if snapshot.tail_page is not None:
            self._pool.cache(snapshot.tail_page)
        snapshot.node.snapshots[snapshot.tail] = snapshot
        for node, after in self._entries_of(snapshot):
            node.entries.setdefault(after, {})[snapshot.slot] = snapshot
        self._used[snapshot.slot] = snapshot

    def _forget(self, snapshot: _Snapshot) -> None:
        """Undo `_remember` and free the slot; the nodes stay."""
        del self._used[snapshot.slot]
        for node, after in self._entries_of(snapshot):
            serving = node.entries[after]
            del serving[snapshot.slot]
            if not serving:
                del node.entries[after]
        del snapshot.node.snapshots[snapshot.tail]
        if snapshot.tail_page is not None:
            self._pool.uncache(snapshot.tail_page)
        self._free_slots.append(snapshot.slot)

    def _prune(self, node: _Node) -> None:
        """Drop a node and those above it, as far up as no snapshot needs them."""
        while node.parent is not None and not node.children and not node.snapshots:
            del node.parent.children[node.tokens]
            self._pool.uncache(node.page)
            node = node.parent

    def _drop(self, snapshot: _Snapshot) -> None:
        self._forget(snapshot)
        self._prune(snapshot.node)

    def _oldest(self) -> _Snapshot | None:
        """The least recently used snapshot that is not pinned."""
        return next((s for slot, s in self._used.items() if slot not in self._pins), None)

    def _pinned_pages(self) -> int:
        """Pages that only the cache holds, and cannot drop."""
        pages: set[int] = set()
        seen: set[int] = set()
        for slot in self._pins:
            snapshot = self._used[slot]
            if snapshot.tail_page is not None:
                pages.add(snapshot.tail_page)
            node = snapshot.node
            while node.parent is not None and id(node) not in seen:
                seen.add(id(node))
                pages.add(node.page)
                node = node.parent
        return sum(self._pool.references(page) == self._pool.cached(page) for page in pages)


def _pack(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()
