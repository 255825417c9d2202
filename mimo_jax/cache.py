"""Committed keys and values: pages for full-attention layers, rings for windowed ones (SWA and drafter).

Nothing uncertain is ever stored. A pass over a block reads the caches and returns its rows' keys and values; once it is
known how many rows stand, `commit` stores exactly those. Dropping the rest is all that rolling back takes.

A ring keeps position c in slot c mod R. What a slot holds follows from the committed length alone, so no positions are
stored. Reading needs visible_keys - 1 slots; rings have visible_keys + block - 1, enough also for a kernel that places
the block's rows in the ring before it reads, rounded up to what a kernel can copy whole.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp

from mimo_jax.config import AttentionConfig, AttentionKind, BackboneConfig, DrafterConfig
from sharding.collectives import Cut
from sharding.layout import Axes, BatchArray

SLOT_ALIGNMENT = 8
"""Rings have a multiple of this many slots: a GPU's shared memory is laid out in groups of 8 rows."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedKV:
    """Keys and values of all full-attention layers, in pages that sequences own by table."""

    k: Annotated[jax.Array, Axes("layers", "pages", None, "kv_heads", None)]
    """[layers, pages, page_size, kv_heads, qk_dim]."""
    v: Annotated[jax.Array, Axes("layers", "pages", None, "kv_heads", None)]
    """[layers, pages, page_size, kv_heads, v_dim]."""
    table: Annotated[jax.Array, Axes("batch", None)]
    """[batch, pages per sequence] int32: page p of a sequence holds its positions p * page_size onward."""

    def commit(self, kv: tuple[jax.Array, jax.Array], lengths: jax.Array, counts: jax.Array) -> "PagedKV":
        """Store the first `counts` [batch] of the rows kv [layers, batch, rows, ...] from position `lengths` on."""
        pages, size = self.k.shape[1:3]
        row = jnp.arange(kv[0].shape[2], dtype=jnp.int32)
        position = lengths[:, None] + row  # [batch, rows]
        column = jnp.minimum(position // size, self.table.shape[1] - 1)
        page = jnp.take_along_axis(self.table, column, axis=1)
        stands = (row < counts[:, None]) & (position < self.table.shape[1] * size)
        page = jnp.where(stands, page, pages)  # out of range: dropped
        at = (slice(None), page, position % size)
        return replace(self, k=_store(self.k, at, kv[0]), v=_store(self.v, at, kv[1]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingKV:
    """Keys and values of all layers of one windowed kind, in one ring a sequence."""

    k: Annotated[jax.Array, Axes("layers", "batch", None, "kv_heads", None)]
    """[layers, batch, slots, kv_heads, qk_dim]."""
    v: Annotated[jax.Array, Axes("layers", "batch", None, "kv_heads", None)]
    """[layers, batch, slots, kv_heads, v_dim]."""

    def commit(self, kv: tuple[jax.Array, jax.Array], lengths: jax.Array, counts: jax.Array) -> "RingKV":
        """Store the first `counts` [batch] of the rows kv [layers, batch, rows, ...] from position `lengths` on."""
        slots = self.k.shape[2]
        row = jnp.arange(kv[0].shape[2], dtype=jnp.int32)
        # of more rows than slots only the last survive; writing one slot twice would leave the winner open
        stands = (row < counts[:, None]) & (row >= counts[:, None] - slots)
        slot = jnp.where(stands, (lengths[:, None] + row) % slots, slots)  # out of range: dropped
        at = (slice(None), jnp.arange(slot.shape[0])[:, None], slot)
        return RingKV(_store(self.k, at, kv[0]), _store(self.v, at, kv[1]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceKV:
    """Keys and values of consecutive positions of some sequences, on which blocks among them are trained."""

    k: jax.Array
    """[layers, batch, positions, kv_heads, qk_dim]."""
    v: jax.Array
    """[layers, batch, positions, kv_heads, v_dim]."""
    first: jax.Array | int = 0
    """Scalar int32: where the first of them stands; what stands below 0 is none."""
    starts: jax.Array | int = 0
    """[blocks] int32, or one for all: where each block's document begins, from which its positions count."""


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("devices",))
@dataclass(frozen=True)
class EarlierParts:
    """No cache: where devices have parts of the same sequences, those before a device's are computed as its own is."""

    devices: Cut
    """What cuts the sequences, if anything does."""

    def ring(self, kv: tuple[jax.Array, jax.Array], visible_keys: int | None) -> tuple[jax.Array, jax.Array]:
        """The positions before this device's rows kv [batch, rows, ...], as in a ring: [1, batch, slots, ...]."""
        # never without a slot: XLA's CPU backend cannot compile gradients of empty arrays on a mesh
        rows, others = kv[0].shape[1], self.devices.width - 1
        if visible_keys is None and others:
            return self.devices.gather(kv[0], 1)[None], self.devices.gather(kv[1], 1)[None]
        slots = max(1, min((visible_keys or rows) - 1, rows * others))
        oldest = self.devices.index() * rows - slots
        k, v = (jnp.roll(self.devices.before(x, slots, 1), oldest % slots, axis=1)[None] for x in kv)
        return k, v


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartsOfSequences:
    """What stands in for a `BackboneCache` in training: nothing is committed, and a device's rows are all it has of
    their sequences.
    """

    lengths: jax.Array
    """[batch] int32: where this device's part begins."""
    kv: dict[AttentionKind, EarlierParts]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents:
    """What stands in for a cache where a row holds several documents, one after the other, and none sees another."""

    positions: jax.Array
    """[batch, rows] int32: where each row stands in its document."""

    @property
    def lengths(self) -> jax.Array:
        """[batch] int32: nothing is committed."""
        return jnp.zeros(self.positions.shape[0], jnp.int32)

    @property
    def kv(self) -> "dict[AttentionKind, Documents]":
        """Alike for all kinds."""
        return {"full": self, "swa": self}


def _store(stored: jax.Array, at: tuple, rows: jax.Array) -> jax.Array:
    return stored.at[at].set(rows.astype(stored.dtype), mode="drop")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BackboneCache:
    """All that the backbone remembers of a batch of sequences."""

    lengths: BatchArray
    """[batch] int32: positions 0 .. length - 1 are committed."""
    kv: dict[AttentionKind, PagedKV | RingKV]

    def commit(self, kv: dict[AttentionKind, tuple[jax.Array, jax.Array]], counts: jax.Array) -> "BackboneCache":
        """Store the first `counts` [batch] of the rows a pass returned, and lengthen the sequences by as much."""
        stored: dict[AttentionKind, PagedKV | RingKV] = {
            kind: cache.commit(kv[kind], self.lengths, counts) for kind, cache in self.kv.items()
        }
        return BackboneCache(self.lengths + counts, stored)


def ring_slots(visible_keys: int | None, block: int, capacity: int) -> int:
    """Slots of a ring whose reader sees `visible_keys` keys and whose writer adds up to `block` rows at a time.

    Without a window, or with one longer than the sequences may grow, every position has its own slot. A multiple of 8.
    """
    needed = capacity if visible_keys is None else min(capacity, visible_keys + block - 1)
    return -(-needed // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def backbone_cache(
    config: BackboneConfig,
    batch: int,
    capacity: int,
    block: int,
    dtype: jax.typing.DTypeLike,
    page_size: int = 64,
    groups: int = 1,
    pages: int | None = None,
) -> BackboneCache:
    """An empty cache in which each of `batch` sequences owns pages for `capacity` positions.

    Args:
        config: The backbone.
        batch: Sequences.
        capacity: Positions a sequence may grow to; rounded up to whole pages.
        block: Rows a decode round may add (the drafter's block; 1 without a drafter).
        dtype: Of keys and values.
        page_size: Positions a page holds.
        groups: Data-parallel groups among which the sequences are split; each numbers its own pages.
        pages: Of all groups together, where no sequence owns any before a table says so.
    """
    columns = -(-capacity // page_size)
    kv: dict[AttentionKind, PagedKV | RingKV] = {}
    for kind in config.attention_kinds:
        attention = config.attention(kind)
        layers = sum(layer.attention == kind for layer in config.layers)
        if kind == "full":
            table = jnp.zeros((batch, columns), jnp.int32)
            if pages is None:
                own = jnp.arange(batch * columns, dtype=jnp.int32).reshape(batch, columns)
                table = own % (batch // groups * columns)
            held = batch * columns if pages is None else pages
            kv[kind] = PagedKV(*_zeros((layers, held, page_size), attention, dtype), table)
        else:
            slots = ring_slots(attention.visible_keys, block, capacity)
            kv[kind] = RingKV(*_zeros((layers, batch, slots), attention, dtype))
    return BackboneCache(jnp.zeros(batch, jnp.int32), kv)


def drafter_ring(config: DrafterConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike) -> RingKV:
    """An empty ring for the drafter's context keys and values, for sequences of up to `capacity` positions."""
    slots = ring_slots(config.attention.visible_keys, config.block_size, capacity)
    return RingKV(*_zeros((config.num_layers, batch, slots), config.attention, dtype))


def _zeros(
    lead: tuple[int, ...], attention: AttentionConfig, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    return (
        jnp.zeros((*lead, attention.kv_heads, attention.qk_dim), dtype),
        jnp.zeros((*lead, attention.kv_heads, attention.v_dim), dtype),
    )
