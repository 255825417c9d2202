"""The decode loop: rounds of draft, verify, accept and commit, repeated on the device.

A round's state is the committed length, the caches up to it, and the anchor: the known token at that position, which is
in no cache yet. The drafter fills a block that starts with the anchor; the backbone verifies its first rows causally;
the longest prefix that agrees with the backbone stands, and one more token, the backbone's own, is the next anchor.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from mimo_jax.backbone import Backbone, BackboneOutput
from mimo_jax.cache import BackboneCache, RingKV
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared, Params
from mimo_jax.sampling import (
    History,
    Purpose,
    Sampling,
    accept_matching,
    accept_rejection,
    probabilities,
    process_logits,
    sample,
    truncate,
    uniforms,
)


@dataclass(frozen=True, eq=False)
class Models:
    """The declared modules, without parameters. Programs are compiled once an instance."""

    backbone: Declared[Backbone]
    drafter: Declared[Drafter] | None = None

    @property
    def capture(self) -> tuple[int, ...]:
        """Backbone layers that the drafter reads."""
        return self.drafter.module.config.target_layer_ids if self.drafter else ()

    def bind_drafter(self, params: "ModelParams") -> Drafter:
        """The drafter with its parameters in it."""
        if self.drafter is None or params.drafter is None:
            raise ValueError("drafting needs a drafter, and none is loaded")
        return self.drafter.bind(params.drafter)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelParams:
    """Parameters of `Models`."""

    backbone: Params
    drafter: Params | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Requests:
    """What does not change while a batch is decoded."""

    sampling: Sampling
    stop_ids: jax.Array
    """[batch, stops] int32: tokens that end a sequence, padded with -1."""
    max_new_tokens: jax.Array
    """[batch] int32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What a round changes; donated to every program."""

    cache: BackboneCache
    ring: RingKV | None
    """The drafter's context, for the same positions as `cache`."""
    anchor: jax.Array
    """[batch] int32: the token at position `cache.lengths`."""
    active: jax.Array
    """[batch] bool: rows still being decoded."""
    emitted: jax.Array
    """[batch] int32: new tokens so far, the anchor included."""
    output_counts: jax.Array
    """[batch, vocab] int32: how often each token is among them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounds:
    """What rounds did, [rounds, batch, ...]; for one round, without the leading axis."""

    drafts: jax.Array
    """[batch, verify_length - 1] int32: the draft tokens that were verified."""
    tokens: jax.Array
    """[batch, verify_length] int32: the first `counts` are the round's output, the next of which is the new anchor."""
    counts: jax.Array
    """[batch] int32: tokens emitted, cut at a stop token and at the limit; 0 for rows that were not active."""
    accepted: jax.Array
    """[batch] int32: drafts the backbone agreed with, before any cut; counts is accepted + 1 where nothing was cut."""


def empty_state(cache: BackboneCache, ring: RingKV | None, vocab_size: int) -> DecodeState:
    """The state before any token: nothing committed, no row active."""
    batch = cache.lengths.shape[0]
    zeros = jnp.zeros(batch, jnp.int32)
    counts = jnp.zeros((batch, vocab_size), jnp.int32)
    return DecodeState(cache, ring, zeros, jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32), counts)


@partial(jax.jit, static_argnames="models", donate_argnames="state")
def prefill(
    models: Models,
    params: ModelParams,
    state: DecodeState,
    requests: Requests,
    tokens: jax.Array,
    counts: jax.Array,
    last: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Commit a chunk of prompt, and start the rows whose prompt it completes.

    Args:
        models: Declared modules.
        params: Their parameters.
        state: Donated.
        requests: Sampling settings and limits.
        tokens: [batch, chunk] int32; row b's next prompt tokens, left-aligned.
        counts: [batch] int32: how many of them are real; 0 leaves a row as it is.
        last: [batch] bool: rows whose prompt ends with this chunk.

    Returns:
        The state, and the first new token [batch] int32 of the rows in `last` (arbitrary elsewhere).
    """
    backbone = models.backbone.bind(params.backbone)
    output = backbone(tokens, state.cache, models.capture)
    state = _commit(models, params, state, output, counts)
    final = jnp.maximum(counts - 1, 0)[:, None, None]
    logits = backbone.logits(jnp.take_along_axis(output.hidden, final, axis=1))  # [batch, 1, vocab]
    # the row's own token is part of the prompt, not of the output, so the block adds nothing to the counts
    history = History(state.output_counts, jnp.zeros_like(counts)[:, None])
    truncated = truncate(process_logits(logits, requests.sampling, history), requests.sampling)
    first = sample(truncated, requests.sampling, state.cache.lengths[:, None], Purpose.TOKEN)
    state, rounds = _emit(state, requests, first[:, :0], first, jnp.zeros_like(counts), starting=last)
    return state, rounds.tokens[:, 0]


@partial(jax.jit, static_argnames=("models", "rounds", "verify_length", "sampled_drafts"), donate_argnames="state")
def decode(
    models: Models,
    params: ModelParams,
    state: DecodeState,
    requests: Requests,
    *,
    rounds: int,
    verify_length: int,
    sampled_drafts: bool = False,
) -> tuple[DecodeState, Rounds, jax.Array]:
    """Run up to `rounds` rounds on the device, fewer if every row finishes.

    Args:
        models: Declared modules; without a drafter, `verify_length` must be 1.
        params: Their parameters.
        state: Donated.
        requests: Sampling settings and limits.
        rounds: Rounds a dispatch.
        verify_length: Rows the backbone verifies, 1 (plain decoding) to the drafter's block size.
        sampled_drafts: Draw drafts from the drafter's distribution and verify by rejection, instead of drafting
            greedily and comparing with the backbone's own keyed pick. The law of the output is the same; the default
            also makes it the same tokens as plain decoding with the same seed.

    Returns:
        The state, the rounds [rounds, batch, ...] (zero beyond the ones run) and how many ran.
    """
    batch = state.anchor.shape[0]
    log = Rounds(
        drafts=jnp.zeros((rounds, batch, verify_length - 1), jnp.int32),
        tokens=jnp.zeros((rounds, batch, verify_length), jnp.int32),
        counts=jnp.zeros((rounds, batch), jnp.int32),
        accepted=jnp.zeros((rounds, batch), jnp.int32),
    )

    def proceed(carry: tuple[jax.Array, DecodeState, Rounds]) -> jax.Array:
        i, state, _ = carry
        return (i < rounds) & jnp.any(state.active)

    def step(carry: tuple[jax.Array, DecodeState, Rounds]) -> tuple[jax.Array, DecodeState, Rounds]:
        i, state, log = carry
        state, done = _round(models, params, state, requests, verify_length, sampled_drafts)
        return i + 1, state, jax.tree.map(lambda a, b: a.at[i].set(b), log, done)

    ran, state, log = jax.lax.while_loop(proceed, step, (jnp.int32(0), state, log))
    return state, log, ran


def _round(
    models: Models,
    params: ModelParams,
    state: DecodeState,
    requests: Requests,
    verify_length: int,
    sampled_drafts: bool,
) -> tuple[DecodeState, Rounds]:
    backbone = models.backbone.bind(params.backbone)
    sampling, lengths = requests.sampling, state.cache.lengths
    positions = lengths[:, None] + 1 + jnp.arange(verify_length)  # where each row's pick will stand

    drafts, q = _draft(models, params, backbone, state, sampling, verify_length, sampled_drafts)
    block = jnp.concatenate([state.anchor[:, None], drafts], axis=1)
    output = backbone(block, state.cache, models.capture)
    logits = process_logits(backbone.logits(output.hidden), sampling, History(state.output_counts, block))
    truncated = truncate(logits, sampling)
    if sampled_drafts:
        uniform = uniforms(sampling.seed, positions[:, :-1], Purpose.ACCEPT)
        final = uniforms(sampling.seed, positions, Purpose.RESIDUAL)
        accepted, extra = accept_rejection(probabilities(truncated, sampling), q, drafts, uniform, final)
        row = jnp.arange(verify_length)
        tokens = jnp.where(row == accepted[:, None], extra[:, None], jnp.roll(block, -1, axis=1))
    else:
        tokens = sample(truncated, sampling, positions, Purpose.TOKEN)
        accepted = accept_matching(drafts, tokens)

    emitted, rounds = _emit(state, requests, drafts, tokens, accepted)
    return _commit(models, params, emitted, output, rounds.counts), rounds


def _draft(
    models: Models,
    params: ModelParams,
    backbone: Backbone,
    state: DecodeState,
    sampling: Sampling,
    verify_length: int,
    sampled: bool,
) -> tuple[jax.Array, jax.Array]:
    """Draft tokens [batch, verify_length - 1] and, if they are sampled, the laws they were drawn from."""
    batch, vocab = state.output_counts.shape
    if verify_length == 1:
        return jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0, vocab), jnp.float32)
    assert state.ring is not None, "a verify length above 1 needs a drafter"
    drafter, lengths = models.bind_drafter(params), state.cache.lengths
    hidden = drafter(backbone.embed(state.anchor), state.ring, lengths)
    logits = backbone.head(hidden[:, 1:verify_length])
    if not sampled:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits[..., :0]
    logits = truncate(logits, sampling)
    positions = lengths[:, None] + 1 + jnp.arange(verify_length - 1)
    return sample(logits, sampling, positions, Purpose.DRAFT), probabilities(logits, sampling)


def _emit(
    state: DecodeState,
    requests: Requests,
    drafts: jax.Array,
    tokens: jax.Array,
    accepted: jax.Array,
    starting: jax.Array | None = None,
) -> tuple[DecodeState, Rounds]:
    """Cut the round's tokens at a stop token and at the limit; take the last one as the next anchor."""
    rows = state.active if starting is None else starting
    column = jnp.arange(tokens.shape[1])
    stops = jnp.any(tokens[..., None] == requests.stop_ids[:, None], axis=-1)  # [batch, verify_length]
    until_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1) + 1, tokens.shape[1])
    left = requests.max_new_tokens - state.emitted
    counts = jnp.where(rows, jnp.minimum(jnp.minimum(accepted + 1, until_stop), left), 0).astype(jnp.int32)

    standing = column < counts[:, None]
    finished = jnp.any(stops & standing, axis=1) | (counts >= left)
    anchor = jnp.take_along_axis(tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    batch, vocab = state.output_counts.shape
    counted = jnp.where(standing, tokens, vocab)  # out of range: dropped
    state = replace(
        state,
        anchor=jnp.where(rows, anchor, state.anchor),
        active=jnp.where(rows, ~finished, state.active),
        emitted=state.emitted + counts,
        output_counts=state.output_counts.at[jnp.arange(batch)[:, None], counted].add(1, mode="drop"),
    )
    return state, Rounds(drafts, tokens, counts, jnp.where(rows, accepted, 0))


def _commit(
    models: Models, params: ModelParams, state: DecodeState, output: BackboneOutput, counts: jax.Array
) -> DecodeState:
    """Store the first `counts` rows of a pass in the backbone's caches and, as context, in the drafter's."""
    ring = state.ring
    if ring is not None:
        context = models.bind_drafter(params).context(output.captured, state.cache.lengths)
        ring = ring.commit(context, state.cache.lengths, counts)
    return replace(state, cache=state.cache.commit(output.kv, counts), ring=ring)
