"""Blocks that share a sequence's keys get what each gets in decoding, from a ring of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import block_attention
from pallas_kernels.window_attention import window_attention

BATCH, POSITIONS, ROWS, HEADS, KV_HEADS, QK, V = 2, 30, 4, 4, 2, 6, 5
ANCHORS = np.array([[0, 1, 13, 29], [2, 8, 8, 26]], np.int32)
STARTS = np.array([[0, 0, 5, 0], [0, 6, 8, 24]], np.int32)
"""Where the blocks' documents begin."""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("visible_keys", [None, 9, 3])
@pytest.mark.parametrize("with_sink", [True, False])
@pytest.mark.parametrize("long", [10, 1])  # windows are taken out of the context from which on
def test_equals_decoding(rng, monkeypatch, causal, visible_keys, with_sink, long):
    monkeypatch.setattr("pallas_kernels.block_attention.LONG", long)
    context = [rng.normal(size=(3, BATCH, POSITIONS, KV_HEADS, d)).astype(np.float32) for d in (QK, V)]
    blocks = ANCHORS.size
    q = rng.normal(size=(blocks, ROWS, HEADS, QK)).astype(np.float32)
    own = [rng.normal(size=(blocks, ROWS, KV_HEADS, d)).astype(np.float32) for d in (QK, V)]
    settings = {"visible_keys": visible_keys, "causal": causal, "layer": jnp.int32(1)}
    settings["sink"] = jnp.asarray(rng.normal(size=HEADS).astype(np.float32)) if with_sink else None

    slots = POSITIONS if visible_keys is None else visible_keys - 1
    rings = [np.full((3, blocks, slots, *x.shape[3:]), np.nan, np.float32) for x in context]
    for block, (anchor, start) in enumerate(zip(ANCHORS.reshape(-1), STARTS.reshape(-1), strict=True)):
        for position in range(max(start, anchor - slots), anchor):
            for ring, x in zip(rings, context, strict=True):
                ring[:, block, (position - start) % slots] = x[:, block // ANCHORS.shape[1], position]
    rings = [np.nan_to_num(ring, nan=7.0) for ring in rings]  # where nothing was, nothing may be read

    anchors, starts = jnp.asarray(ANCHORS.reshape(-1)), jnp.asarray(STARTS.reshape(-1))
    q, context, rings, own = jax.tree.map(jnp.asarray, (q, context, rings, own))
    expected = window_attention(q, *rings, *own, lengths=anchors - starts, **settings)
    placed = {"anchors": anchors, "starts": starts}
    for before in (0, 4):  # rows that stand before the sequence's beginning, which none may see
        led = [jnp.pad(x, ((0, 0), (0, 0), (before, 0), (0, 0), (0, 0)), constant_values=7.0) for x in context]
        run = jax.jit(lambda first, *led: block_attention(q, *led, *own, first=first, **placed, **settings))
        np.testing.assert_allclose(run(-before, *led), expected, rtol=1e-5, atol=1e-6)
