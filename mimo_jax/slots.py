"""Continuous batching on the device: requests live in slots, and programs run on some of the slots at a time.

All that a device remembers of the requests being served is one value, `Slots`, donated to every program. A program
takes the rows it works on out of the slots, runs a prefill or rounds on them as on any batch, and puts them back.
Pages are shared by all slots; which of them a slot owns the host decides, and says with each program.

Slots, pages and saved rings are numbered within a data-parallel group. A number beyond the last stands for none: such a
row is not active, and nothing of it is stored.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.cache import BackboneCache, PagedKV, RingKV, backbone_cache, drafter_ring
from mimo_jax.config import AttentionKind
from mimo_jax.model import Model
from mimo_jax.request import SamplingParams, batch_requests
from mimo_jax.speculative import (
    DecodeState,
    ModelParams,
    Models,
    PromptChunk,
    Requests,
    Rounds,
    decode,
    draft,
    empty_state,
    prefill,
    verify,
)
from sharding.layout import Axes, BatchArray

MAX_STOP_IDS = 32
"""Tokens that may end a request, the model's own among them."""
MAX_LOGIT_BIASES = 512
"""Tokens whose logits a request may change."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rings:
    """Copies of rings, for sequences that begin like one that was here."""

    kv: dict[AttentionKind, RingKV]
    drafter: RingKV | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What a device remembers of the requests being served."""

    state: DecodeState
    """Of every slot."""
    requests: Requests
    """Of every slot."""
    saved: Rings | None
    """Snapshots; None where there are to be none."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The slots that a program works on, and the pages they got since the last one."""

    slots: BatchArray
    """[rows] int32."""
    first_page: BatchArray
    """[rows] int32: where in a slot's table its new pages go."""
    pages: Annotated[jax.Array, Axes("batch", None)]
    """[rows, most new pages] int32, padded with -1."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masks:
    """What may follow each of a batch's rows (see `sampling.keep_allowed`)."""

    words: Annotated[jax.Array, Axes("batch", None, None)]
    """[rows, tokens, words] int32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafts:
    """What some slots' next round is to verify."""

    tokens: Annotated[jax.Array, Axes("batch", None)]
    """[rows, verify_length - 1] int32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Admission:
    """Requests that begin, or go on after they were put off, in slots of their own."""

    slots: BatchArray
    """[rows] int32."""
    requests: Requests
    """[rows, ...]."""
    lengths: BatchArray
    """[rows] int32: positions that are in its pages already."""
    emitted: BatchArray
    """[rows] int32: new tokens so far, which the prompt that follows holds."""
    output_counts: Annotated[jax.Array, Axes("batch", "logits")]
    """[rows, vocab] int32: how often each token is among them."""
    table: Annotated[jax.Array, Axes("batch", None)]
    """[rows, pages of a sequence] int32: its pages; those it has not got yet are 0."""
    saved: BatchArray
    """[rows] int32: the snapshot to begin from."""
    copy_from: BatchArray
    """[rows] int32: a page of which it needs a copy of its own."""
    copy_to: BatchArray
    """[rows] int32: the page that becomes the copy."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Saving:
    """Slots whose rings are to be kept."""

    slots: BatchArray
    """[rows] int32."""
    saved: BatchArray
    """[rows] int32: where."""


def empty_slots(model: Model, slots: int, capacity: int, *, page_size: int, pages: int, snapshots: int) -> Slots:
    """Slots without requests, on the devices; numbers are those of all data-parallel groups together.

    Args:
        model: A loaded model.
        slots: Requests at a time.
        capacity: Positions a sequence may grow to.
        page_size: Positions a page holds.
        pages: Pages.
        snapshots: Snapshots; 0 for none.
    """
    sizes = {"page_size": page_size, "pages": pages, "snapshots": snapshots}
    return model.made(partial(build_slots, model, slots, capacity, **sizes))


def build_slots(model: Model, slots: int, capacity: int, *, page_size: int, pages: int, snapshots: int) -> Slots:
    """What `empty_slots` puts on the devices, to be traced."""
    config, drafter, dtype = model.config, model.drafter_config, model.dtype
    block = drafter.block_size if drafter else 1

    def rings(batch: int) -> tuple[BackboneCache, RingKV | None]:
        cache = backbone_cache(config, batch, capacity, block, dtype, page_size, pages=pages)
        return cache, drafter_ring(drafter, batch, capacity, dtype) if drafter else None

    state = empty_state(*rings(slots), config.vocab_size)
    nobody = batch_requests(
        [[]] * slots, [SamplingParams()] * slots, (), config.vocab_size, MAX_STOP_IDS, MAX_LOGIT_BIASES
    )
    nobody = replace(nobody, logprobs=np.zeros(slots, bool))
    saved = None
    if snapshots:
        cache, ring = rings(snapshots)
        saved = Rings(_windowed(cache), ring)
    return Slots(state, jax.tree.map(jnp.asarray, nobody), saved)


@partial(jax.jit, static_argnames="models", donate_argnames="slots")
def admit_rows(models: Models, params: ModelParams, slots: Slots, admission: Admission) -> tuple[Slots, jax.Array]:
    """Put requests into slots, with what they share with earlier ones."""
    state, at = slots.state, admission.slots
    kv: dict[AttentionKind, PagedKV | RingKV] = {}
    for kind, cache in state.cache.kv.items():
        if isinstance(cache, PagedKV):
            k, v = (
                x.at[:, admission.copy_to].set(x.at[:, admission.copy_from].get(mode="clip"), mode="drop")
                for x in (cache.k, cache.v)
            )
            kv[kind] = PagedKV(k, v, _put(cache.table, admission.table, at))
        else:
            kv[kind] = _restored(cache, slots.saved.kv[kind] if slots.saved else None, admission)
    ring = state.ring and _restored(state.ring, slots.saved.drafter if slots.saved else None, admission)
    rows = jnp.zeros_like(at)
    state = replace(
        state,
        cache=BackboneCache(_put(state.cache.lengths, admission.lengths, at), kv),
        ring=ring,
        active=_put(state.active, rows.astype(bool), at),
        emitted=_put(state.emitted, admission.emitted, at),
        output_counts=_put(state.output_counts, admission.output_counts, at),
    )
    requests = jax.tree.map(lambda whole, new: _put(whole, new, at), slots.requests, admission.requests)
    return Slots(state, requests, slots.saved), jnp.int32(0)


@partial(jax.jit, static_argnames="models", donate_argnames="slots")
def save_rows(models: Models, params: ModelParams, slots: Slots, saving: Saving) -> tuple[Slots, jax.Array]:
    """Keep the rings of slots as they are."""
    assert slots.saved is not None, "there is no room for snapshots"

    def kept(ring: RingKV, saved: RingKV) -> RingKV:
        return jax.tree.map(lambda s, r: _put(s, _take(r, saving.slots, 1), saving.saved, 1), saved, ring)

    state, saved = slots.state, slots.saved
    rings: dict[AttentionKind, RingKV] = {
        kind: kept(ring, saved.kv[kind]) for kind, ring in _windowed(state.cache).items()
    }
    drafter = kept(state.ring, saved.drafter) if state.ring and saved.drafter else None
    return Slots(state, slots.requests, Rings(rings, drafter)), jnp.int32(0)


@partial(jax.jit, static_argnames=("models", "top_logprobs"), donate_argnames="slots")
def prefill_rows(
    models: Models,
    params: ModelParams,
    slots: Slots,
    rows: Rows,
    chunk: PromptChunk,
    masks: Masks,
    *,
    top_logprobs: int,
) -> tuple[Slots, Rounds]:
    """`speculative.prefill` of some slots."""
    slots, state, requests = _taken(slots, rows)
    state, done = prefill(models, params, state, requests, chunk, masks.words, top_logprobs=top_logprobs)
    return _put_back(slots, rows, state), _one(done)


@partial(jax.jit, static_argnames=("models", "rounds", "verify_length", "top_logprobs"), donate_argnames="slots")
def decode_rows(
    models: Models,
    params: ModelParams,
    slots: Slots,
    rows: Rows,
    *,
    rounds: int,
    verify_length: int,
    top_logprobs: int,
) -> tuple[Slots, Rounds]:
    """`speculative.decode` of some slots."""
    slots, state, requests = _taken(slots, rows)
    statics: dict[str, Any] = {"rounds": rounds, "verify_length": verify_length, "top_logprobs": top_logprobs}
    state, done = decode(models, params, state, requests, **statics)
    return _put_back(slots, rows, state), done


@partial(jax.jit, static_argnames=("models", "verify_length"), donate_argnames="slots")
def draft_rows(
    models: Models, params: ModelParams, slots: Slots, rows: Rows, *, verify_length: int
) -> tuple[Slots, jax.Array]:
    """The drafts of some slots' next round [rows, verify_length - 1]; nothing is changed."""
    slots, state, requests = _taken(slots, rows)
    drafts, _ = draft(models, params, state, requests.sampling, verify_length)
    return _put_back(slots, rows, state), models.topology.cut("batch").gather(drafts, 0)


@partial(jax.jit, static_argnames=("models", "top_logprobs"), donate_argnames="slots")
def verify_rows(
    models: Models,
    params: ModelParams,
    slots: Slots,
    rows: Rows,
    drafts: Drafts,
    masks: Masks,
    *,
    top_logprobs: int,
) -> tuple[Slots, Rounds]:
    """The rest of a round whose drafts the host has seen."""
    slots, state, requests = _taken(slots, rows)
    state, done = verify(models, params, state, requests, drafts.tokens, masks=masks.words, top_logprobs=top_logprobs)
    groups = models.topology.cut("batch")
    return _put_back(slots, rows, state), _one(jax.tree.map(lambda x: groups.gather(x, 0), done))


def _one(done: Rounds) -> Rounds:
    """One round with the leading axis of many."""
    return jax.tree.map(lambda x: x[None], done)


def _taken(slots: Slots, rows: Rows) -> tuple[Slots, DecodeState, Requests]:
    """The slots with their new pages, and the batch of the rows."""
    state, at = slots.state, rows.slots
    kv: dict[AttentionKind, PagedKV | RingKV] = {}
    taken: dict[AttentionKind, PagedKV | RingKV] = {}
    for kind, cache in state.cache.kv.items():
        if isinstance(cache, PagedKV):
            column = rows.first_page[:, None] + jnp.arange(rows.pages.shape[1], dtype=jnp.int32)
            column = jnp.where(rows.pages >= 0, column, cache.table.shape[1])  # out of range: dropped
            table = cache.table.at[at[:, None], column].set(rows.pages, mode="drop")
            kv[kind] = replace(cache, table=table)
            taken[kind] = replace(cache, table=_take(table, at))
        else:
            kv[kind] = cache
            taken[kind] = jax.tree.map(lambda x: _take(x, at, 1), cache)
    slots = replace(slots, state=replace(state, cache=replace(state.cache, kv=kv)))
    real = at < state.anchor.shape[0]
    batch = DecodeState(
        cache=BackboneCache(_take(state.cache.lengths, at), taken),
        ring=state.ring and jax.tree.map(lambda x: _take(x, at, 1), state.ring),
        anchor=_take(state.anchor, at),
        active=_take(state.active, at) & real,
        emitted=_take(state.emitted, at),
        output_counts=_take(state.output_counts, at),
    )
    return slots, batch, jax.tree.map(lambda x: _take(x, at), slots.requests)


def _put_back(slots: Slots, rows: Rows, batch: DecodeState) -> Slots:
    """The slots after a batch of their rows."""
    state, at = slots.state, rows.slots
    kv: dict[AttentionKind, PagedKV | RingKV] = {}
    for kind, cache in state.cache.kv.items():
        done = batch.cache.kv[kind]
        if isinstance(cache, PagedKV):
            kv[kind] = PagedKV(done.k, done.v, cache.table)
        else:
            kv[kind] = jax.tree.map(lambda whole, new: _put(whole, new, at, 1), cache, done)
    return replace(
        slots,
        state=DecodeState(
            cache=BackboneCache(_put(state.cache.lengths, batch.cache.lengths, at), kv),
            ring=state.ring and jax.tree.map(lambda whole, new: _put(whole, new, at, 1), state.ring, batch.ring),
            anchor=_put(state.anchor, batch.anchor, at),
            active=_put(state.active, batch.active, at),
            emitted=_put(state.emitted, batch.emitted, at),
            output_counts=_put(state.output_counts, batch.output_counts, at),
        ),
    )


def _restored(ring: RingKV, saved: RingKV | None, admission: Admission) -> RingKV:
    """Rings of slots replaced by snapshots, where there is one to begin from."""
    if saved is None:
        return ring
    some = admission.saved < saved.k.shape[1]
    at = jnp.where(some, admission.slots, ring.k.shape[1])  # out of range: dropped
    return jax.tree.map(lambda r, s: _put(r, _take(s, admission.saved, 1), at, 1), ring, saved)


def _windowed(cache: BackboneCache) -> dict[AttentionKind, RingKV]:
    return {kind: ring for kind, ring in cache.kv.items() if isinstance(ring, RingKV)}


def _take(whole: jax.Array, at: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.take(whole, at, axis=axis, mode="clip")


def _put(whole: jax.Array, rows: jax.Array, at: jax.Array, axis: int = 0) -> jax.Array:
    return whole.at[(slice(None),) * axis + (at,)].set(rows.astype(whole.dtype), mode="drop")
