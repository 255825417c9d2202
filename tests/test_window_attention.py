"""Attention over a ring and a block, against float64 NumPy over explicit positions."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.cache import RingKV, ring_slots
from pallas_kernels.window_attention import window_attention
from tests.numpy_attention import attention

attend = jax.jit(window_attention, static_argnames=("visible_keys", "causal"))
commit = jax.jit(RingKV.commit)
GARBAGE = 1e4
LAYERS, LAYER = 3, 1


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    slots: int
    rows: int
    visible_keys: int | None
    causal: bool
    sink: bool


CASES = [
    Case(heads=4, kv_heads=2, qk_dim=12, v_dim=8, slots=16, rows=8, visible_keys=9, causal=True, sink=True),
    Case(heads=6, kv_heads=2, qk_dim=8, v_dim=12, slots=15, rows=8, visible_keys=8, causal=False, sink=True),
    Case(heads=3, kv_heads=3, qk_dim=6, v_dim=6, slots=37, rows=5, visible_keys=9, causal=True, sink=False),
    Case(heads=4, kv_heads=1, qk_dim=8, v_dim=4, slots=10, rows=8, visible_keys=3, causal=True, sink=True),
    Case(heads=4, kv_heads=1, qk_dim=8, v_dim=4, slots=10, rows=8, visible_keys=3, causal=False, sink=False),
    Case(heads=2, kv_heads=1, qk_dim=16, v_dim=8, slots=21, rows=1, visible_keys=21, causal=True, sink=True),
    Case(heads=2, kv_heads=1, qk_dim=4, v_dim=4, slots=1, rows=3, visible_keys=1, causal=True, sink=False),
    Case(heads=2, kv_heads=2, qk_dim=6, v_dim=8, slots=24, rows=4, visible_keys=None, causal=True, sink=True),
    Case(heads=2, kv_heads=2, qk_dim=6, v_dim=8, slots=24, rows=4, visible_keys=None, causal=False, sink=False),
    Case(heads=2, kv_heads=1, qk_dim=8, v_dim=8, slots=7, rows=3, visible_keys=40, causal=True, sink=False),
    # several tiles of rows: windows shorter and longer than a tile, whole and partial last tiles, bidirectional
    Case(heads=4, kv_heads=2, qk_dim=8, v_dim=4, slots=16, rows=75, visible_keys=9, causal=True, sink=True),
    Case(heads=2, kv_heads=1, qk_dim=8, v_dim=8, slots=60, rows=96, visible_keys=50, causal=True, sink=False),
    Case(heads=2, kv_heads=2, qk_dim=6, v_dim=8, slots=24, rows=70, visible_keys=None, causal=True, sink=True),
    Case(heads=2, kv_heads=1, qk_dim=8, v_dim=8, slots=20, rows=41, visible_keys=17, causal=False, sink=True),
]


@dataclass
class Data:
    lengths: np.ndarray
    q: np.ndarray
    block_k: np.ndarray
    block_v: np.ndarray
    ring_k: np.ndarray
    ring_v: np.ndarray
    sink: np.ndarray | None
    history: list[dict[int, tuple[np.ndarray, np.ndarray]]]
    """Per sequence, the keys and values of the positions the ring still holds."""


def lengths_of(case):
    around = {0, 1, case.slots - 1, case.slots, case.slots + 1, 2 * case.slots + 3, 1_000_003, 1_048_575}
    if case.visible_keys is not None:
        around |= {max(0, case.visible_keys + d) for d in (-2, -1, 0, 1)}
    if case.visible_keys is None:  # without a window every position has a slot of its own
        around = {length for length in around if length <= case.slots}
    return np.array(sorted(around), np.int32)


def make(case, rng, dtype=jnp.float32, lengths=None):
    lengths = lengths_of(case) if lengths is None else np.array(lengths, np.int32)
    batch = len(lengths)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype).astype(np.float32)

    ring_k = GARBAGE * normal(LAYERS, batch, case.slots, case.kv_heads, case.qk_dim)
    ring_v = GARBAGE * normal(LAYERS, batch, case.slots, case.kv_heads, case.v_dim)
    history = []
    for b, length in enumerate(lengths.tolist()):
        held = {}
        for position in range(max(0, length - case.slots), length):
            held[position] = normal(case.kv_heads, case.qk_dim), normal(case.kv_heads, case.v_dim)
            ring_k[LAYER, b, position % case.slots], ring_v[LAYER, b, position % case.slots] = held[position]
        history.append(held)
    return Data(
        lengths=lengths,
        q=normal(batch, case.rows, case.heads, case.qk_dim),
        block_k=normal(batch, case.rows, case.kv_heads, case.qk_dim),
        block_v=normal(batch, case.rows, case.kv_heads, case.v_dim),
        ring_k=ring_k,
        ring_v=ring_v,
        sink=normal(case.heads) if case.sink else None,
        history=history,
    )


def run(case, data, dtype=jnp.float32, **changes):
    given = {**vars(data), **changes}
    arrays = [jnp.asarray(given[name], dtype) for name in ("q", "ring_k", "ring_v", "block_k", "block_v")]
    out = attend(
        *arrays,
        layer=jnp.int32(LAYER),
        lengths=jnp.asarray(given["lengths"]),
        visible_keys=case.visible_keys,
        causal=case.causal,
        sink=None if given["sink"] is None else jnp.asarray(given["sink"], jnp.float32),
    )
    assert out.dtype == dtype
    return np.asarray(out.astype(jnp.float32))


def expected(case, data):
    outs = []
    for b, length in enumerate(data.lengths.tolist()):
        old = sorted(data.history[b])
        k = np.stack([*(data.history[b][p][0] for p in old), *data.block_k[b]])
        v = np.stack([*(data.history[b][p][1] for p in old), *data.block_v[b]])
        at = np.array([*old, *range(length, length + case.rows)])
        query = np.arange(length, length + case.rows)[:, None]
        visible = np.ones((case.rows, len(at)), bool) if not case.causal else at <= query
        if case.visible_keys is not None:
            visible = visible & (query - at < case.visible_keys)
        outs.append(attention(data.q[b], k, v, visible, data.sink))
    return np.stack(outs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case, rng):
    data = make(case, rng)
    np.testing.assert_allclose(run(case, data), expected(case, data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_bfloat16(case, rng):
    data = make(case, rng, jnp.bfloat16)
    # weights and the result are rounded to bf16 (2**-9 relative each); values reach about 3
    np.testing.assert_allclose(run(case, data, jnp.bfloat16), expected(case, data), rtol=1e-2, atol=1.5e-2)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_what_is_not_visible_changes_nothing(case, rng):
    data = make(case, rng)
    other_k = (GARBAGE * rng.normal(size=data.ring_k.shape)).astype(np.float32)
    other_v = (GARBAGE * rng.normal(size=data.ring_v.shape)).astype(np.float32)
    for b, length in enumerate(data.lengths.tolist()):
        for position in data.history[b]:
            if length - position < case.visible_keys:  # seen at least by row 0
                slot = position % case.slots
                other_k[LAYER, b, slot], other_v[LAYER, b, slot] = data.history[b][position]
    np.testing.assert_array_equal(run(case, data), run(case, data, ring_k=other_k, ring_v=other_v))


@pytest.mark.parametrize("length", [20, 1_000_000])
@pytest.mark.parametrize("visible_keys", [2, 9, 16])
def test_window_edge(length, visible_keys, rng):
    """The key at distance visible_keys - 1 is seen, the one at visible_keys is not, by each row on its own."""
    case = Case(2, 1, 4, 4, slots=24, rows=3, visible_keys=visible_keys, causal=True, sink=False)
    data = make(case, rng)
    data.lengths = np.full_like(data.lengths, length)
    equal = {"ring_k": np.zeros_like(data.ring_k), "block_k": np.zeros_like(data.block_k)}  # so no weight vanishes
    before = run(case, data, **equal)
    for distance in (visible_keys - 1, visible_keys):
        for row in range(case.rows):
            position = length + row - distance
            changed_v, block_v = data.ring_v.copy(), data.block_v.copy()
            if position < length:
                changed_v[LAYER, :, position % case.slots] += 1e6
            else:
                block_v[:, position - length] += 1e6
            after = run(case, data, ring_v=changed_v, block_v=block_v, **equal)
            moved = np.any(before != after, axis=(0, 2, 3))
            assert moved[row] == (distance < visible_keys)
            later = [r for r in range(row + 1, case.rows) if distance + r - row >= visible_keys]
            assert not moved[later].any()


def test_bidirectional_rows_see_later_rows_and_causal_ones_do_not(rng):
    for causal in (True, False):
        case = Case(2, 1, 8, 8, slots=12, rows=6, visible_keys=7, causal=causal, sink=True)
        data = make(case, rng)
        block_k = data.block_k.copy()
        block_k[:, -1] += 1.0
        moved = np.any(run(case, data) != run(case, data, block_k=block_k), axis=(2, 3))
        assert moved[:, -1].all()
        assert moved[:, :-1].all() == (not causal)
        assert moved[:, :-1].any() == (not causal)


def test_sink(rng):
    case = CASES[0]
    data = make(case, rng)
    plain = run(case, data, sink=None)
    absent = run(case, data, sink=np.full(case.heads, -np.inf, np.float32))
    np.testing.assert_allclose(absent, plain, rtol=1e-6, atol=1e-6)
    swallowed = run(case, data, sink=np.full(case.heads, 1e4, np.float32))
    np.testing.assert_array_equal(swallowed, np.zeros_like(plain))
    one_head = np.full(case.heads, -np.inf, np.float32)
    one_head[2] = 3.0
    moved = np.any(run(case, data, sink=one_head) != absent, axis=(0, 1, 3))
    np.testing.assert_array_equal(moved, np.arange(case.heads) == 2)


@pytest.mark.parametrize("visible_keys", [1, 5, 8, 30])
@pytest.mark.parametrize("chunk", [1, 8, 13])
def test_chunks_equal_one_pass(visible_keys, chunk, rng):
    total, heads, kv_heads, qk_dim, v_dim = 39, 4, 2, 8, 6

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q = normal(2, total, heads, qk_dim)
    k, v = normal(2, total, kv_heads, qk_dim), normal(2, total, kv_heads, v_dim)
    sink = normal(heads)
    settings = {"layer": jnp.int32(0), "visible_keys": visible_keys, "causal": True, "sink": sink}

    def empty(slots):
        return RingKV(*(jnp.zeros((1, 2, slots, kv_heads, dim), jnp.float32) for dim in (qk_dim, v_dim)))

    ring = empty(1)
    whole = attend(q, ring.k, ring.v, k, v, lengths=np.zeros(2, np.int32), **settings)

    ring = empty(ring_slots(visible_keys, 8, 64))
    parts = []
    for start in range(0, total, chunk):
        pad = max(0, start + chunk - total)  # the last chunk keeps its shape, as a prefill chunk does
        part = [
            np.pad(a[:, start : start + chunk], ((0, 0), (0, pad), (0, 0), (0, 0)), constant_values=9.0)
            for a in (q, k, v)
        ]
        lengths = np.full(2, start, np.int32)
        out = attend(part[0], ring.k, ring.v, part[1], part[2], lengths=lengths, **settings)
        parts.append(np.asarray(out)[:, : chunk - pad])
        counts = np.full(2, chunk - pad, np.int32)
        ring = commit(ring, (part[1][None], part[2][None]), lengths, counts)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-5, atol=1e-5)

    at = np.arange(total)
    visible = (at <= at[:, None]) & (at[:, None] - at < visible_keys)
    for b in range(2):
        np.testing.assert_allclose(whole[b], attention(q[b], k[b], v[b], visible, sink), rtol=1e-5, atol=1e-5)
