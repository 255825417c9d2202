"""Caches against a dictionary of positions, and how many slots a ring needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.cache import SLOT_ALIGNMENT, BackboneCache, PagedKV, RingKV, ring_slots
from pallas_kernels.window_attention import window_attention

LAYERS, HEADS, DIMS = 2, 2, (3, 4)

commit_ring = jax.jit(RingKV.commit)
commit_pages = jax.jit(PagedKV.commit)


def rows_of(rng, batch: int, rows: int) -> tuple[np.ndarray, ...]:
    return tuple(rng.standard_normal((LAYERS, batch, rows, HEADS, d)).astype(np.float32) for d in DIMS)


def steps_of(rng, batch: int, rows: int, steps: int):
    """(rows' keys and values, counts) of random steps; now and then nothing is committed."""
    for _ in range(steps):
        counts = rng.integers(0, rows + 1, batch)
        yield rows_of(rng, batch, rows), (counts * (rng.random() < 0.9)).astype(np.int32)


@pytest.mark.parametrize(("slots", "rows"), [(5, 3), (4, 4), (3, 8), (1, 2), (17, 8)])
def test_rings_hold_the_newest_rows(rng, slots, rows):
    batch = 3
    ring = RingKV(*(jnp.full((LAYERS, batch, slots, HEADS, d), np.nan) for d in DIMS))
    expected = tuple(np.full((LAYERS, batch, slots, HEADS, d), np.nan, np.float32) for d in DIMS)
    lengths = np.array([0, 2, 11], np.int32)
    for kv, counts in steps_of(rng, batch, rows, 25):
        ring = commit_ring(ring, kv, jnp.asarray(lengths), jnp.asarray(counts))
        for b in range(batch):
            for r in range(counts[b]):
                for stored, new in zip(expected, kv, strict=True):
                    stored[:, b, (lengths[b] + r) % slots] = new[:, b, r]
        lengths += counts
        np.testing.assert_array_equal(ring.k, expected[0])
        np.testing.assert_array_equal(ring.v, expected[1])


@pytest.mark.parametrize(("page_size", "columns", "rows"), [(4, 5, 3), (16, 2, 8), (1, 20, 5), (4, 1, 9)])
def test_pages_hold_every_row_where_the_table_says(rng, page_size, columns, rows):
    """Sequences own pages in random order; what lies beyond their capacity is dropped and damages nothing."""
    batch, spare = 3, 2
    table = rng.permutation(batch * columns + spare)[: batch * columns].reshape(batch, columns).astype(np.int32)
    shape = (LAYERS, batch * columns + spare, page_size, HEADS)
    pages = PagedKV(*(jnp.full((*shape, d), np.nan) for d in DIMS), table=jnp.asarray(table))
    expected = tuple(np.full((*shape, d), np.nan, np.float32) for d in DIMS)
    lengths = np.array([0, 1, 5], np.int32)
    for kv, counts in steps_of(rng, batch, rows, 12):
        pages = commit_pages(pages, kv, jnp.asarray(lengths), jnp.asarray(counts))
        for b in range(batch):
            for r in range(counts[b]):
                position = lengths[b] + r
                if position < columns * page_size:
                    for stored, new in zip(expected, kv, strict=True):
                        stored[:, table[b, position // page_size], position % page_size] = new[:, b, r]
        lengths += counts
        np.testing.assert_array_equal(pages.k, expected[0])
        np.testing.assert_array_equal(pages.v, expected[1])
    assert lengths.max() > columns * page_size


def test_committing_lengthens_each_sequence_by_its_count(rng):
    kv = {"swa": rows_of(rng, 2, 4), "full": rows_of(rng, 2, 4)}
    table = jnp.arange(4, dtype=jnp.int32).reshape(2, 2)
    cache = BackboneCache(
        jnp.array([3, 0], jnp.int32),
        {
            "swa": RingKV(*(jnp.zeros((LAYERS, 2, 6, HEADS, d)) for d in DIMS)),
            "full": PagedKV(*(jnp.zeros((LAYERS, 4, 4, HEADS, d)) for d in DIMS), table=table),
        },
    )
    after = cache.commit(jax.tree.map(jnp.asarray, kv), jnp.array([2, 0], jnp.int32))
    assert after.lengths.tolist() == [5, 0]
    np.testing.assert_array_equal(after.kv["swa"].k[:, 0, 3:5], kv["swa"][0][:, 0, :2])
    np.testing.assert_array_equal(after.kv["full"].v[:, 0, 3], kv["full"][1][:, 0, 0])
    assert not np.asarray(after.kv["swa"].k[:, 1]).any()


def test_slots_of_a_ring():
    assert ring_slots(129, 8, 1 << 20) == 136
    assert ring_slots(128, 8, 1 << 20) == 136  # 135 are needed
    assert ring_slots(1024, 8, 1 << 20) == 1032
    assert ring_slots(None, 8, 512) == 512
    assert ring_slots(129, 8, 100) == 104


def accepted_counts(rng, block: int, steps: int) -> np.ndarray:
    """Random accepted counts 1 .. block, with stretches of all and of one."""
    counts = rng.integers(1, block + 1, steps)
    counts[steps // 3 : steps // 3 + 50] = block
    counts[steps // 2 : steps // 2 + 50] = 1
    return counts


@pytest.mark.parametrize(("visible", "block"), [(129, 8), (128, 8), (1024, 8), (7, 4), (2, 8)])
def test_a_ring_written_before_it_is_read_needs_visible_plus_block_minus_one(rng, visible, block):
    """A kernel may place a block's rows first and leave rejected ones to be written over: 3000 steps lose nothing."""

    def loses(slots: int) -> bool:
        held = np.full(slots, -1)
        length = 0
        for accepted in accepted_counts(np.random.default_rng(0), block, 3000):
            rows = np.arange(length, length + block)
            held[rows % slots] = rows
            for r in rows:  # each row must see its window, itself included
                seen = np.arange(max(0, r - visible + 1), r + 1)
                if (held[seen % slots] != seen).any():
                    return True
            length += accepted
        return False

    needed = visible + block - 1
    assert needed <= ring_slots(visible, block, 1 << 20) < needed + SLOT_ALIGNMENT
    assert not loses(needed)
    assert loses(needed - 1)


@pytest.mark.parametrize(("visible", "block", "steps"), [(5, 4, 3000), (12, 8, 3000), (129, 8, 600)])
def test_a_ring_of_accepted_rows_needs_visible_minus_one(rng, visible, block, steps):
    """Our own discipline: read first, commit what was accepted. One slot fewer and some step differs."""
    accepted = accepted_counts(rng, block, steps).astype(np.int32)

    def run(slots: int) -> np.ndarray:
        """Outputs [steps, block, dim] over keys and values that depend on the position alone."""
        ring = RingKV(*(jnp.zeros((1, 1, slots, 1, d)) for d in (4, 4)))

        def features(positions: jax.Array, salt: float) -> jax.Array:
            waves = positions[:, None].astype(jnp.float32) * jnp.array([0.7, 1.3, 2.1, 3.7]) + salt
            return jnp.sin(waves)[None, :, None]  # [1, rows, 1, 4]

        def step(carry, count):
            ring, length = carry
            positions = length + jnp.arange(block, dtype=jnp.int32)
            q, k, v = (features(positions, salt) for salt in (0.0, 1.0, 2.0))
            lengths = length[None]
            out = window_attention(
                q, ring.k, ring.v, k, v, layer=jnp.int32(0), lengths=lengths, visible_keys=visible, causal=True,
                sink=None,
            )  # fmt: skip
            ring = ring.commit((k[None], v[None]), lengths, count[None])
            return (ring, length + count), out[0, :, 0]

        return np.asarray(jax.lax.scan(step, (ring, jnp.int32(0)), jnp.asarray(accepted))[1])

    ample = run(visible + 3 * block)
    np.testing.assert_allclose(run(visible - 1), ample, atol=1e-5)
    assert np.abs(run(visible - 2) - ample).max() > 1e-3
