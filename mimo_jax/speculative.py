"""The decode loop: rounds of draft, verify, accept and commit, repeated on the device.

A round's state is the committed length, the caches up to it, and the anchor: the known token at that position, which is
in no cache yet. The drafter fills a block that starts with the anchor; the backbone verifies its first rows causally;
the longest prefix that agrees with the backbone stands, and one more token, the backbone's own, is the next anchor.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.backbone import Backbone, BackboneOutput
from mimo_jax.cache import BackboneCache, RingKV
from mimo_jax.drafter import Drafter
from mimo_jax.logprobs import Logprobs, logprobs
from mimo_jax.params import Declared, Params
from mimo_jax.sampling import (
    History,
    Purpose,
    Sampling,
    accept_matching,
    accept_rejection,
    keep_allowed,
    probabilities,
    process_logits,
    sample,
    truncate,
    uniforms,
)
from sharding.layout import Axes, BatchArray
from sharding.topology import Topology


@dataclass(frozen=True, eq=False)
class Models:
    """The declared modules, without parameters. Programs are compiled once an instance."""

    backbone: Declared[Backbone]
    drafter: Declared[Drafter] | None = None

    @property
    def topology(self) -> Topology:
        """What a device has of them. Programs are written for one device: on a mesh, `Model` runs them on all."""
        return self.backbone.module.topology

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
    stop_ids: Annotated[jax.Array, Axes("batch", None)]
    """[batch, stops] int32: tokens that end a sequence, padded with -1."""
    max_new_tokens: BatchArray
    """[batch] int32."""
    logprobs: Annotated[jax.Array | None, Axes("batch")] = None
    """[batch] bool: who wants log-probabilities, where a program gives them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptChunk:
    """The next tokens of a batch's prompts."""

    tokens: Annotated[jax.Array, Axes("batch", None)]
    """[batch, chunk] int32, left-aligned."""
    counts: BatchArray
    """[batch] int32: how many of them are real; 0 leaves a row as it is."""
    last: BatchArray
    """[batch] bool: rows whose prompt ends with this chunk."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What a round changes; donated to every program."""

    cache: BackboneCache
    ring: RingKV | None
    """The drafter's context, for the same positions as `cache`."""
    anchor: BatchArray
    """[batch] int32: the token at position `cache.lengths`."""
    active: BatchArray
    """[batch] bool: rows still being decoded."""
    emitted: BatchArray
    """[batch] int32: new tokens so far, the anchor included."""
    output_counts: Annotated[jax.Array, Axes("batch", "logits")]
    """[batch, vocab] int32: how often each token is among them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounds:
    """What rounds did, [rounds, batch, ...]; for one round, without the leading axis. On a mesh, of all sequences."""

    drafts: jax.Array
    """[batch, verify_length - 1] int32: the draft tokens that were verified."""
    tokens: jax.Array
    """[batch, verify_length] int32: the first `counts` are the round's output, the next of which is the new anchor."""
    counts: jax.Array
    """[batch] int32: tokens emitted, cut at a stop token and at the limit; 0 for rows that were not active."""
    accepted: jax.Array
    """[batch] int32: drafts the backbone agreed with, before any cut; counts is accepted + 1 where nothing was cut."""
    active: jax.Array
    """[batch] bool: rows that go on after the round."""
    logprobs: Logprobs | None = None
    """Of `tokens`, if asked for."""

    @property
    def ran(self) -> int:
        """How many of the rounds ran: each gives some row a token."""
        return int(np.asarray(self.counts).any(axis=1).sum())


def empty_state(cache: BackboneCache, ring: RingKV | None, vocab_size: int) -> DecodeState:
    """The state before any token: nothing committed, no row active."""
    batch = cache.lengths.shape[0]
    zeros = jnp.zeros(batch, jnp.int32)
    counts = jnp.zeros((batch, vocab_size), jnp.int32)
    return DecodeState(cache, ring, zeros, jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32), counts)


@partial(jax.jit, static_argnames=("models", "top_logprobs"), donate_argnames="state")
def prefill(
    models: Models,
    params: ModelParams,
    state: DecodeState,
    requests: Requests,
    chunk: PromptChunk,
    masks: jax.Array | None = None,
    *,
    top_logprobs: int = 0,
) -> tuple[DecodeState, Rounds]:
    """Commit a chunk of prompt, and start the rows whose prompt it completes.

    Args:
        models: Declared modules.
        params: Their parameters.
        state: Donated.
        requests: Sampling settings and limits.
        chunk: What to commit.
        masks: [batch, 1, words] int32: what a first token may be (see `sampling.keep_allowed`).
        top_logprobs: Give log-probabilities to who wants them, with those of so many tokens; 0 for none.

    Returns:
        The state, and a round that gave the rows which start their first new token.
    """
    backbone, part, counts = models.backbone.bind(params.backbone), models.topology.cut("logits"), chunk.counts
    output = backbone(chunk.tokens, state.cache, models.capture, counts)
    state = _commit(models, params, state, output, counts)
    final = jnp.maximum(counts - 1, 0)[:, None, None]
    logits = backbone.logits(jnp.take_along_axis(output.hidden, final, axis=1))  # [batch, 1, vocab]
    # the row's own token is part of the prompt, not of the output, so the block adds nothing to the counts
    history = History(state.output_counts, jnp.zeros_like(counts)[:, None])
    processed = keep_allowed(process_logits(logits, requests.sampling, history, part), masks, part)
    truncated = truncate(processed, requests.sampling, part)
    first = sample(truncated, requests.sampling, state.cache.lengths[:, None], Purpose.TOKEN, part)
    state, done = _emit(models, state, requests, first[:, :0], first, jnp.zeros_like(counts), starting=chunk.last)
    if top_logprobs:
        assert requests.logprobs is not None, "somebody has to say who wants log-probabilities"
        done = replace(done, logprobs=logprobs(logits, first, requests.logprobs & chunk.last, top_logprobs, part))
    return state, _of_all_groups(models, done, axis=0)


@partial(
    jax.jit,
    static_argnames=("models", "rounds", "verify_length", "sampled_drafts", "top_logprobs"),
    donate_argnames="state",
)
def decode(
    models: Models,
    params: ModelParams,
    state: DecodeState,
    requests: Requests,
    *,
    rounds: int,
    verify_length: int,
    sampled_drafts: bool = False,
    top_logprobs: int = 0,
) -> tuple[DecodeState, Rounds]:
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
        top_logprobs: As for `prefill`.

    Returns:
        The state, and the rounds [rounds, batch, ...], zero beyond the ones that ran.
    """
    groups = models.topology.cut("batch")

    def one(state: DecodeState) -> tuple[DecodeState, Rounds]:
        drafts, q = draft(models, params, state, requests.sampling, verify_length, sampled_drafts)
        return verify(models, params, state, requests, drafts, q, top_logprobs=top_logprobs)

    done = jax.eval_shape(one, state)[1]
    log = jax.tree.map(lambda s: jnp.zeros((rounds, *s.shape), s.dtype), done)

    def proceed(carry: tuple[jax.Array, DecodeState, Rounds]) -> jax.Array:
        i, state, _ = carry
        return (i < rounds) & groups.any(jnp.any(state.active))  # groups share experts: all go on, or none

    def step(carry: tuple[jax.Array, DecodeState, Rounds]) -> tuple[jax.Array, DecodeState, Rounds]:
        i, state, log = carry
        state, done = one(state)
        return i + 1, state, jax.tree.map(lambda a, b: a.at[i].set(b), log, done)

    _, state, log = jax.lax.while_loop(proceed, step, (jnp.int32(0), state, log))
    return state, _of_all_groups(models, log, axis=1)


def _of_all_groups(models: Models, rounds: Rounds, axis: int) -> Rounds:
    """Rounds with the sequences of all data-parallel groups along an axis, for the host to read."""
    return jax.tree.map(lambda x: models.topology.cut("batch").gather(x, axis), rounds)


def draft(
    models: Models,
    params: ModelParams,
    state: DecodeState,
    sampling: Sampling,
    verify_length: int,
    sampled: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Draft tokens [batch, verify_length - 1] and, if they are sampled, the laws they were drawn from (of all ids)."""
    part, batch = models.topology.cut("logits"), state.anchor.shape[0]
    if verify_length == 1:
        vocab = state.output_counts.shape[-1] * part.width
        return jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0, vocab), jnp.float32) if sampled else None
    assert state.ring is not None, "a verify length above 1 needs a drafter"
    backbone, drafter, lengths = models.backbone.bind(params.backbone), models.bind_drafter(params), state.cache.lengths
    hidden = drafter(backbone.embed(state.anchor), state.ring, lengths)
    logits = backbone.head(hidden[:, 1:verify_length])
    if not sampled:
        return part.argmax(logits), None
    logits = part.gather(truncate(logits, sampling, part), -1)
    positions = lengths[:, None] + 1 + jnp.arange(verify_length - 1)
    return sample(logits, sampling, positions, Purpose.DRAFT), probabilities(logits, sampling)


def verify(
    models: Models,
    params: ModelParams,
    state: DecodeState,
    requests: Requests,
    drafts: jax.Array,
    q: jax.Array | None = None,
    masks: jax.Array | None = None,
    *,
    top_logprobs: int = 0,
) -> tuple[DecodeState, Rounds]:
    """The rest of a round: what stands of a batch's drafts, committed.

    Args:
        models: Declared modules.
        params: Their parameters.
        state: With the anchors that the drafts follow.
        requests: Sampling settings and limits.
        drafts: [batch, rows - 1] int32.
        q: [batch, rows - 1, vocab] float32, the laws the drafts were drawn from: accept by rejection, not by matching.
        masks: [batch, rows, words] int32: what may follow each row (see `sampling.keep_allowed`).
        top_logprobs: As for `prefill`.
    """
    backbone, part, verify_length = (
        models.backbone.bind(params.backbone),
        models.topology.cut("logits"),
        drafts.shape[1] + 1,
    )
    sampling, lengths = requests.sampling, state.cache.lengths
    positions = lengths[:, None] + 1 + jnp.arange(verify_length)  # where each row's pick will stand

    block = jnp.concatenate([state.anchor[:, None], drafts], axis=1)
    output = backbone(block, state.cache, models.capture, jnp.where(state.active, verify_length, 0))
    logits = backbone.logits(output.hidden)
    processed = process_logits(logits, sampling, History(state.output_counts, block), part)
    truncated = truncate(keep_allowed(processed, masks, part), sampling, part)
    if q is not None:
        truncated = part.gather(truncated, -1)
        uniform = uniforms(sampling.seed, positions[:, :-1], Purpose.ACCEPT)
        final = uniforms(sampling.seed, positions, Purpose.RESIDUAL)
        accepted, extra = accept_rejection(probabilities(truncated, sampling), q, drafts, uniform, final)
        row = jnp.arange(verify_length)
        tokens = jnp.where(row == accepted[:, None], extra[:, None], jnp.roll(block, -1, axis=1))
    else:
        tokens = sample(truncated, sampling, positions, Purpose.TOKEN, part)
        accepted = accept_matching(drafts, tokens)

    emitted, done = _emit(models, state, requests, drafts, tokens, accepted)
    if top_logprobs:
        assert requests.logprobs is not None, "somebody has to say who wants log-probabilities"
        done = replace(done, logprobs=logprobs(logits, tokens, requests.logprobs & state.active, top_logprobs, part))
    return _commit(models, params, emitted, output, done.counts), done


def _emit(
    models: Models,
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
    counted = jnp.where(standing, models.topology.cut("logits").local(tokens, vocab), vocab)
    state = replace(
        state,
        anchor=jnp.where(rows, anchor, state.anchor),
        active=jnp.where(rows, ~finished, state.active),
        emitted=state.emitted + counts,
        output_counts=state.output_counts.at[jnp.arange(batch)[:, None], counted].add(1, mode="drop"),
    )
    return state, Rounds(drafts, tokens, counts, jnp.where(rows, accepted, 0), state.active)


def _commit(
    models: Models, params: ModelParams, state: DecodeState, output: BackboneOutput, counts: jax.Array
) -> DecodeState:
    """Store the first `counts` rows of a pass in the backbone's caches and, as context, in the drafter's."""
    ring = state.ring
    if ring is not None:
        context = models.bind_drafter(params).context(output.captured, state.cache.lengths)
        ring = ring.commit(context, state.cache.lengths, counts)
    return replace(state, cache=state.cache.commit(output.kv, counts), ring=ring)
