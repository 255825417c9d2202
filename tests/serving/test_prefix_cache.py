"""The prefix cache, case by case."""

from array import array

import pytest

from serve.engine.pages import IntegrityError, PagePool
from serve.engine.prefix_cache import Hit, PrefixCache


def cache_of(pages: int, page_size: int, snapshots: int, slack: int) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(pages)
    return pool, PrefixCache(pool, page_size, snapshots, slack)


def keep(pool: PagePool, cache: PrefixCache, tokens: tuple[int, ...]) -> int | None:
    """Let a sequence compute the tokens, be saved, and end."""
    pages = pool.allocate(-(-len(tokens) // cache.page_size))
    assert pages is not None
    slot = cache.insert(tokens, pages)
    pool.release(pages)
    return slot


def test_the_same_prompt_again_needs_only_its_last_token():
    pool, cache = cache_of(pages=8, page_size=4, snapshots=2, slack=1)
    pages = pool.allocate(3)
    assert pages is not None
    slot = cache.insert(range(10), pages)
    hit = cache.match(range(10), 9)
    assert hit == Hit(9, tuple(pages[:2]), pages[2], 0 if slot is None else slot)
    assert [pool.references(page) for page in pages] == [3, 3, 2]


def test_a_hit_may_end_inside_a_page_that_the_snapshot_filled():
    pool, cache = cache_of(pages=8, page_size=4, snapshots=2, slack=8)
    pages = pool.allocate(3)
    assert pages is not None
    slot = cache.insert(range(10), pages)
    assert slot is not None
    assert cache.match([0, 1, 2, 3, 4, 5, 99], 6) == Hit(6, (pages[0],), pages[1], slot)
    assert cache.match([0, 1, 99], 2) == Hit(2, (), pages[0], slot)
    assert cache.match([0, 99], 1) is None  # nine short of the snapshot; the rings keep eight


def test_a_pinned_hit_outlives_every_eviction():
    pool, cache = cache_of(pages=4, page_size=4, snapshots=1, slack=0)
    assert keep(pool, cache, tuple(range(6))) == 0
    hit = cache.match(range(7), 6)
    assert hit is not None
    cache.clear()
    assert not cache.evict(3)
    assert keep(pool, cache, (9, 9)) is None
    assert (cache.used_snapshots, cache.held_pages, pool.free) == (1, 1, 2)
    cache.unpin(hit)
    with pytest.raises(IntegrityError, match="unpinned once"):
        cache.unpin(hit)
    assert cache.evict(3)  # all but the full page, which stays with whoever asked
    assert (cache.used_snapshots, cache.held_pages) == (0, 0)
    pool.release(hit.pages)
    assert pool.free == pool.total


def test_evicting_in_vain_drops_nothing():
    pool, cache = cache_of(pages=4, page_size=4, snapshots=2, slack=0)
    running = pool.allocate(2)
    keep(pool, cache, (1, 2, 3, 4, 5))
    assert not cache.evict(3)
    assert (cache.used_snapshots, cache.held_pages, pool.free) == (1, 2, 0)
    assert cache.evict(2)
    assert running is not None
    pool.release(running)
    assert pool.free == pool.total


def test_no_snapshots_no_hits():
    pool, cache = cache_of(pages=4, page_size=4, snapshots=0, slack=8)
    assert keep(pool, cache, tuple(range(8))) is None
    assert cache.match(range(8), 8) is None
    assert pool.free == pool.total


def test_a_sequence_has_pages_for_its_tokens():
    pool, cache = cache_of(pages=4, page_size=4, snapshots=1, slack=8)
    pages = pool.allocate(1)
    assert pages is not None
    with pytest.raises(ValueError, match="5 tokens lie in 2 pages of 4, of which 1 were given"):
        cache.insert(range(5), pages)


@pytest.mark.parametrize("wrong", [{"page_size": 0}, {"snapshots": -1}, {"slack": -1}])
def test_refuses_numbers_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        PrefixCache(PagePool(1), **{"page_size": 1, "snapshots": 1, "slack": 1, **wrong})


def test_a_long_prompt_is_no_deeper_than_python_can_go():
    length = 100_000
    pool, cache = cache_of(pages=length, page_size=4, snapshots=2, slack=8)
    tokens = array("i", range(length))
    assert keep(pool, cache, tuple(tokens)) is not None
    assert keep(pool, cache, tuple(tokens[: length // 2])) is not None
    hit = cache.match(tokens, length - 1)
    assert hit is not None
    assert (hit.length, len(hit.pages)) == (length - 1, (length - 1) // 4)
    assert cache.held_pages == 1  # the tail; the others are the hit's too
    cache.check()
    pool.release(hit.pages)
    cache.unpin(hit)
    cache.clear()
    cache.check()
    assert pool.free == pool.total


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool, cache: pool.cache(0),
        lambda pool, cache: pool.uncache(0),
        lambda pool, cache: cache._free_slots.pop(),
        lambda pool, cache: cache._pins.update([1]),
        lambda pool, cache: cache._root.entries.clear(),
        lambda pool, cache: next(iter(cache._root.children.values())).snapshots.clear(),
        lambda pool, cache: cache._root.children.clear(),
        lambda pool, cache: setattr(next(iter(cache._root.children.values())), "depth", 2),
        lambda pool, cache: setattr(next(iter(cache._used.values())), "length", 7),
    ],
)
def test_check_sees_damage(damage):
    pool, cache = cache_of(pages=4, page_size=4, snapshots=2, slack=8)
    pages = pool.allocate(2)
    assert pages is not None
    cache.insert(range(6), pages)
    cache.check()
    damage(pool, cache)
    with pytest.raises(IntegrityError):
        cache.check()
