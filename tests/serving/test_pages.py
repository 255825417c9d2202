"""The page pool against plain sets and counters."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.pages import IntegrityError, PagePool


def test_allocates_all_or_nothing():
    pool = PagePool(3)
    assert pool.allocate(4) is None
    assert pool.free == 3
    assert sorted(pool.allocate(2) or []) == [0, 1]
    assert pool.allocate(2) is None
    assert pool.allocate(0) == []
    assert (pool.free, pool.total) == (1, 3)


@pytest.mark.parametrize("wrong", [lambda: PagePool(0), lambda: PagePool(1).allocate(-1)])
def test_refuses_numbers_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()


@pytest.mark.parametrize("page", [-1, 0, 1, 4])
@pytest.mark.parametrize("misuse", [PagePool.retain, PagePool.cache, PagePool.uncache, lambda p, n: p.release([n])])
def test_a_page_that_is_free_or_none_at_all_cannot_be_referred_to(misuse, page):
    pool = PagePool(4)
    with pytest.raises(IntegrityError, match=f"page {page}"):
        misuse(pool, page)
    pool.check()


def test_the_two_kinds_of_references_are_not_mixed_up():
    pool = PagePool(1)
    pool.allocate(1)
    with pytest.raises(IntegrityError, match="more often than it entered"):
        pool.uncache(0)
    pool.cache(0)
    pool.release([0])
    with pytest.raises(IntegrityError, match="released more often"):
        pool.release([0])
    assert (pool.free, pool.idle) == (0, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free.append(0),
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._free.pop(),
        lambda pool: pool._cached.__setitem__(0, -1),
        lambda pool: pool._cached.__setitem__(2, 1),
        lambda pool: setattr(pool, "_idle", 1),
    ],
)
def test_check_sees_damage(damage):
    pool = PagePool(3)
    pool.allocate(1)
    pool.check()
    damage(pool)
    with pytest.raises(IntegrityError):
        pool.check()


@given(st.integers(1, 6), st.lists(st.tuples(st.sampled_from("arRcC"), st.integers(0, 5)), max_size=60))
def test_counts_as_plain_counters_do(total, operations):
    pool, sequences, cached = PagePool(total), Counter(), Counter()
    for operation, number in operations:
        used = {page for page in range(total) if sequences[page] + cached[page]}
        if operation == "a":
            pages = pool.allocate(number)
            assert (pages is None) == (number > total - len(used))
            assert len(pages or []) == (0 if pages is None else number)
            assert used.isdisjoint(pages or [])
            sequences.update(pages or [])
        elif operation == "r" and number in used:
            pool.retain(number)
            sequences[number] += 1
        elif operation == "R" and sequences[number]:
            pool.release(iter([number]))
            sequences[number] -= 1
        elif operation == "c" and number in used:
            pool.cache(number)
            cached[number] += 1
        elif operation == "C" and cached[number]:
            pool.uncache(number)
            cached[number] -= 1
        pool.check()
        for page in range(total):
            assert (pool.references(page), pool.cached(page)) == (sequences[page] + cached[page], cached[page])
        assert pool.free == sum(not sequences[p] and not cached[p] for p in range(total))
        assert pool.idle == sum(not sequences[p] and cached[p] > 0 for p in range(total))
