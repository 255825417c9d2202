"""Attention over pages and a block, against float64 NumPy over explicit positions."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.cache import PagedKV
from pallas_kernels.paged_attention import paged_attention, reference
from tests.numpy_attention import attention

commit = jax.jit(PagedKV.commit)
GARBAGE = 1e4
LAYERS, LAYER = 3, 2


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    rows: int
    page_size: int
    columns: int
    keys_per_step: int
    sink: bool


CASES = [
    Case(heads=4, kv_heads=2, qk_dim=12, v_dim=8, rows=8, page_size=16, columns=7, keys_per_step=64, sink=True),
    Case(heads=6, kv_heads=2, qk_dim=8, v_dim=12, rows=3, page_size=1, columns=29, keys_per_step=8, sink=False),
    Case(heads=3, kv_heads=3, qk_dim=6, v_dim=6, rows=1, page_size=64, columns=3, keys_per_step=64, sink=True),
    Case(heads=4, kv_heads=1, qk_dim=8, v_dim=4, rows=5, page_size=64, columns=2, keys_per_step=16, sink=False),
    Case(heads=2, kv_heads=1, qk_dim=8, v_dim=8, rows=4, page_size=16, columns=3, keys_per_step=512, sink=False),
    # 1216 keys and the real step of 512: three steps, the last moved back inside the table
    Case(heads=2, kv_heads=1, qk_dim=8, v_dim=4, rows=2, page_size=64, columns=19, keys_per_step=512, sink=True),
    # several tiles of rows, the last a partial one
    Case(heads=4, kv_heads=2, qk_dim=8, v_dim=4, rows=75, page_size=16, columns=5, keys_per_step=32, sink=True),
]


@pytest.fixture
def attend(monkeypatch):
    """The op, compiled anew for every number of keys a step."""

    def compiled(case):
        monkeypatch.setattr(reference, "KEYS_PER_STEP", case.keys_per_step)
        return jax.jit(lambda *args, **kwargs: paged_attention(*args, **kwargs))

    return compiled


@dataclass
class Data:
    lengths: np.ndarray
    table: np.ndarray
    q: np.ndarray
    block_k: np.ndarray
    block_v: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    sink: np.ndarray | None
    k: np.ndarray
    """[batch, capacity, ...]: committed keys by position."""
    v: np.ndarray


def lengths_of(case):
    capacity, step = case.columns * case.page_size, min(case.columns, max(1, case.keys_per_step // case.page_size))
    keys = step * case.page_size
    around = {0, 1, case.page_size - 1, case.page_size, case.page_size + 1, keys - 1, keys, keys + 1, 2 * keys + 1}
    around |= {capacity - 1, capacity}
    return np.array(sorted(length for length in around if length <= capacity), np.int32)


def make(case, rng, dtype=jnp.float32, lengths=None):
    lengths = lengths_of(case) if lengths is None else np.array(lengths, np.int32)
    batch, capacity = len(lengths), case.columns * case.page_size
    pages = batch * case.columns + 5

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype).astype(np.float32)

    table = rng.permutation(pages)[: batch * case.columns].reshape(batch, case.columns).astype(np.int32)
    k, v = normal(batch, capacity, case.kv_heads, case.qk_dim), normal(batch, capacity, case.kv_heads, case.v_dim)
    k_pages = GARBAGE * normal(LAYERS, pages, case.page_size, case.kv_heads, case.qk_dim)
    v_pages = GARBAGE * normal(LAYERS, pages, case.page_size, case.kv_heads, case.v_dim)
    # the last sequence is the longest: its whole pages that the one before it also fills are shared
    shared = lengths[-2] // case.page_size
    table[-2, :shared] = table[-1, :shared]
    k[-2, : shared * case.page_size] = k[-1, : shared * case.page_size]
    v[-2, : shared * case.page_size] = v[-1, : shared * case.page_size]
    for b, length in enumerate(lengths.tolist()):
        for position in range(length):
            page, offset = table[b, position // case.page_size], position % case.page_size
            k_pages[LAYER, page, offset], v_pages[LAYER, page, offset] = k[b, position], v[b, position]
    return Data(
        lengths=lengths,
        table=table,
        q=normal(batch, case.rows, case.heads, case.qk_dim),
        block_k=normal(batch, case.rows, case.kv_heads, case.qk_dim),
        block_v=normal(batch, case.rows, case.kv_heads, case.v_dim),
        k_pages=k_pages,
        v_pages=v_pages,
        sink=normal(case.heads) if case.sink else None,
        k=k,
        v=v,
    )


def run(compiled, data, dtype=jnp.float32, **changes):
    given = {**vars(data), **changes}
    out = compiled(
        *(jnp.asarray(given[name], dtype) for name in ("q", "k_pages", "v_pages", "block_k", "block_v")),
        layer=jnp.int32(LAYER),
        page_table=jnp.asarray(given["table"]),
        lengths=jnp.asarray(given["lengths"]),
        sink=None if given["sink"] is None else jnp.asarray(given["sink"], jnp.float32),
    )
    assert out.dtype == dtype
    return np.asarray(out.astype(jnp.float32))


def expected(case, data):
    outs = []
    for b, length in enumerate(data.lengths.tolist()):
        k = np.concatenate([data.k[b, :length], data.block_k[b]])
        v = np.concatenate([data.v[b, :length], data.block_v[b]])
        at = np.arange(length + case.rows)
        visible = at <= np.arange(length, length + case.rows)[:, None]
        outs.append(attention(data.q[b], k, v, visible, data.sink))
    return np.stack(outs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case, attend, rng):
    data = make(case, rng)
    np.testing.assert_allclose(run(attend(case), data), expected(case, data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_bfloat16(case, attend, rng):
    data = make(case, rng, jnp.bfloat16)
    # weights and the result are rounded to bf16 (2**-9 relative each); values reach about 3
    np.testing.assert_allclose(run(attend(case), data, jnp.bfloat16), expected(case, data), rtol=1e-2, atol=1.5e-2)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_what_is_not_committed_changes_nothing(case, attend, rng):
    """Neither other layers, nor pages of nobody, nor what lies beyond a length, nor the table beyond it."""
    data, compiled = make(case, rng), attend(case)
    live = np.zeros(data.k_pages.shape[:3], bool)
    table = rng.integers(0, data.k_pages.shape[1], data.table.shape).astype(np.int32)
    for b, length in enumerate(data.lengths.tolist()):
        used = -(-length // case.page_size)
        table[b, :used] = data.table[b, :used]
        for position in range(length):
            live[LAYER, data.table[b, position // case.page_size], position % case.page_size] = True

    def other(pages):
        return np.where(live[..., None, None], pages, GARBAGE * rng.normal(size=pages.shape)).astype(np.float32)

    changed = run(compiled, data, k_pages=other(data.k_pages), v_pages=other(data.v_pages), table=table)
    np.testing.assert_array_equal(changed, run(compiled, data))


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_renaming_pages_changes_nothing(case, attend, rng):
    data, compiled = make(case, rng), attend(case)
    pages = data.k_pages.shape[1]
    new_name = rng.permutation(pages)
    k_pages, v_pages = np.empty_like(data.k_pages), np.empty_like(data.v_pages)
    k_pages[:, new_name], v_pages[:, new_name] = data.k_pages, data.v_pages
    renamed = run(compiled, data, k_pages=k_pages, v_pages=v_pages, table=new_name[data.table].astype(np.int32))
    np.testing.assert_array_equal(renamed, run(compiled, data))


def test_every_committed_key_is_seen_and_no_later_row(attend, rng):
    case = CASES[0]
    data, compiled = make(case, rng), attend(case)
    before = run(compiled, data)
    longest = int(data.lengths[-1])
    for position in (0, 1, case.page_size, longest // 2, longest - 1):
        v_pages = data.v_pages.copy()
        v_pages[LAYER, data.table[-1, position // case.page_size], position % case.page_size] += 1e4
        assert np.all(np.any(run(compiled, data, v_pages=v_pages)[-1] != before[-1], axis=-1))
    block_v = data.block_v.copy()
    block_v[:, 3] += 1e4
    moved = np.any(run(compiled, data, block_v=block_v) != before, axis=(2, 3))
    np.testing.assert_array_equal(moved, np.broadcast_to(np.arange(case.rows) >= 3, moved.shape))


def test_sink(attend, rng):
    case = CASES[0]
    data, compiled = make(case, rng), attend(case)
    plain = run(compiled, data, sink=None)
    absent = run(compiled, data, sink=np.full(case.heads, -np.inf, np.float32))
    np.testing.assert_allclose(absent, plain, rtol=1e-6, atol=1e-6)
    swallowed = run(compiled, data, sink=np.full(case.heads, 1e4, np.float32))
    np.testing.assert_array_equal(swallowed, np.zeros_like(plain))


@pytest.mark.parametrize(("page_size", "chunk"), [(4, 1), (4, 6), (16, 13)])
def test_chunks_equal_one_pass(page_size, chunk, attend, rng):
    total, heads, kv_heads, qk_dim, v_dim = 39, 4, 2, 8, 6
    case = Case(heads, kv_heads, qk_dim, v_dim, chunk, page_size, 52 // page_size, keys_per_step=16, sink=True)
    compiled = attend(case)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q = normal(2, total, heads, qk_dim)
    k, v = normal(2, total, kv_heads, qk_dim), normal(2, total, kv_heads, v_dim)
    sink = normal(heads)
    columns = case.columns
    table = rng.permutation(2 * columns).reshape(2, columns).astype(np.int32)
    pool = (1, 2 * columns, page_size, kv_heads)
    empty = PagedKV(jnp.zeros((*pool, qk_dim)), jnp.zeros((*pool, v_dim)), jnp.asarray(table))

    pages, parts = empty, []
    for start in range(0, total, chunk):
        pad = max(0, start + chunk - total)  # the last chunk keeps its shape, as a prefill chunk does
        part = [
            np.pad(a[:, start : start + chunk], ((0, 0), (0, pad), (0, 0), (0, 0)), constant_values=9.0)
            for a in (q, k, v)
        ]
        lengths, counts = np.full(2, start, np.int32), np.full(2, chunk - pad, np.int32)
        out = compiled(
            part[0], pages.k, pages.v, *part[1:], layer=jnp.int32(0), page_table=table, lengths=lengths, sink=sink
        )
        parts.append(np.asarray(out)[:, : chunk - pad])
        pages = commit(pages, (part[1][None], part[2][None]), lengths, counts)
    chunked = np.concatenate(parts, axis=1)

    zeros = np.zeros(2, np.int32)
    whole = compiled(q, empty.k, empty.v, k, v, layer=jnp.int32(0), page_table=table, lengths=zeros, sink=sink)
    np.testing.assert_allclose(chunked, whole, rtol=1e-5, atol=1e-5)
    visible = np.tril(np.ones((total, total), bool))
    for b in range(2):
        np.testing.assert_allclose(whole[b], attention(q[b], k[b], v[b], visible, sink), rtol=1e-5, atol=1e-5)
