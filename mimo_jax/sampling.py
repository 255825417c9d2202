"""From logits to tokens: penalties, temperature, top-k, top-p, min-p and keyed randomness, one setting a sequence.

All rows of a block are processed at once, each as ordinary decoding would process it: row i's history is the
sequence so far and the block's tokens up to row i. A token's random numbers depend on (seed, absolute position,
purpose) alone, so samples do not change with the batch, the block boundaries or the drafter.

On a mesh a device has a part of the vocabulary (`part`), and everything [..., vocab] is that part of it.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from sharding.collectives import Cut
from sharding.layout import Axes, BatchArray


class Purpose(enum.IntEnum):
    """What random numbers at a position are for; each purpose has a stream of its own."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How each sequence of a batch picks its tokens. All arrays [batch] unless noted."""

    temperature: BatchArray
    """float32; 0 means greedy."""
    top_k: BatchArray
    """int32; 0 means all."""
    top_p: BatchArray
    """float32; 1 means all."""
    min_p: BatchArray
    """float32; share of the best token's probability that a token must reach; 0 means none."""
    repetition_penalty: BatchArray
    """float32; divides positive and multiplies negative logits of tokens in prompt or output; 1 means none."""
    presence_penalty: BatchArray
    """float32; subtracted once for tokens in the output."""
    frequency_penalty: BatchArray
    """float32; subtracted for every time a token is in the output."""
    seed: BatchArray
    """uint32."""
    bias_ids: Annotated[jax.Array, Axes("batch", None)]
    """[batch, biases] int32; ids outside the vocabulary are ignored."""
    bias: Annotated[jax.Array, Axes("batch", None)]
    """[batch, biases] float32, added to those ids' logits."""
    prompt_seen: Annotated[jax.Array, Axes("batch", "logits")]
    """[batch, vocab] bool: tokens that occur in the prompt."""


class History(NamedTuple):
    """What penalties need to know of a row's past."""

    counts: jax.Array
    """[batch, vocab] int32: how often each token is in the output so far, the block's first token included."""
    block: jax.Array
    """[batch, rows] int32: the block's tokens; row i has seen those up to i."""


def process_logits(logits: jax.Array, sampling: Sampling, history: History, part: Cut = Cut()) -> jax.Array:
    """Apply penalties and logit bias: [batch, rows, vocab] float32 to the same shape.

    Order: repetition, then frequency and presence, then bias.
    """
    penalised = jnp.any(
        (sampling.repetition_penalty != 1) | (sampling.presence_penalty != 0) | (sampling.frequency_penalty != 0)
    )
    logits = jax.lax.cond(penalised, lambda x: _penalise(x, sampling, history, part), lambda x: x, logits)

    def biased(x: jax.Array) -> jax.Array:
        batch = jnp.arange(x.shape[0])[:, None]
        ids = part.local(sampling.bias_ids, x.shape[-1])  # elsewhere: dropped
        return x.at[batch, :, ids].add(sampling.bias[..., None], mode="drop")

    return jax.lax.cond(jnp.any(sampling.bias != 0), biased, lambda x: x, logits)


def keep_allowed(logits: jax.Array, masks: jax.Array | None, part: Cut = Cut()) -> jax.Array:
    """Send to -inf what masks do not allow.

    Args:
        logits: [batch, rows, vocab] float32.
        masks: [batch, rows, ceil(vocab / 32)] int32, or None for no limits: token t is allowed where bit t % 32 of word
            t // 32 is set.
        part: Which part of the vocabulary the logits are of; masks are of all of it.
    """
    if masks is None:
        return logits
    bits = (masks[..., None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    allowed = bits.reshape(*masks.shape[:-1], -1)[..., : logits.shape[-1] * part.width]
    return jnp.where(part.part(allowed, -1) == 1, logits, -jnp.inf)


def _penalise(logits: jax.Array, sampling: Sampling, history: History, part: Cut) -> jax.Array:
    def apply(x: jax.Array, counts: jax.Array, seen: jax.Array) -> jax.Array:
        """On [batch, rows, n] logits, with output counts and presence in prompt or output of the same shape."""
        repetition, presence, frequency = (
            p[:, None, None]
            for p in (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        )
        x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
        return x - frequency * counts.astype(jnp.float32) - presence * (counts > 0).astype(jnp.float32)

    counts = history.counts[:, None]
    shared = apply(logits, counts, sampling.prompt_seen[:, None] | (counts > 0))
    # Rows differ only in the block's own tokens after the first: those entries are computed anew, row by row.
    later = history.block[:, 1:]  # [batch, rows - 1]
    rows = history.block.shape[1]
    within = jnp.arange(1, rows) <= jnp.arange(rows)[:, None]  # [rows, rows - 1]: token j is in row i's past
    same = (later[:, :, None] == later[:, None, :]).astype(jnp.int32)  # [batch, token, other]
    repeats = jnp.einsum("ij,btj->bit", within.astype(jnp.int32), same)
    batch, row = jnp.arange(later.shape[0])[:, None, None], jnp.arange(rows)[None, :, None]
    at = part.local(later, logits.shape[-1])
    counts = history.counts[batch[..., 0], at][:, None] + repeats  # [batch, rows, rows - 1]
    seen = (counts > 0) | sampling.prompt_seen[batch[..., 0], at][:, None]
    own = apply(logits[batch, row, at[:, None]], counts, seen)
    return shared.at[batch, row, at[:, None]].set(own, mode="drop")


def truncate(logits: jax.Array, sampling: Sampling, part: Cut = Cut()) -> jax.Array:
    """Divide by the temperature and send to -inf what top-k, top-p (of what top-k leaves) and min-p exclude.

    Args:
        logits: [batch, rows, vocab] float32, processed.
        sampling: Its rows with temperature 0 are treated as if it were 1.
        part: Which part of the vocabulary the logits are of; the others are gathered if anything is to be excluded.

    Tokens that tie with the last one kept are kept too. Nothing is sorted: thresholds are found by bisection over the
    bits of the float32 values, which is exact and costs a fixed number of passes over the vocabulary.
    """
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None, None]
    scaled = logits / temperature
    top_k, top_p, min_p = (p[:, None, None] for p in (sampling.top_k, sampling.top_p, sampling.min_p))

    def cut(x: jax.Array) -> jax.Array:
        x = part.gather(x, -1)
        order = _ordered_bits(x)

        def largest(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
            """The largest threshold a row for which a predicate, true at 0 and never again once false, holds."""

            def step(i: jax.Array, t: jax.Array) -> jax.Array:
                raised = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
                return jnp.where(holds(raised), raised, t)

            return jax.lax.fori_loop(0, 32, step, jnp.zeros((*x.shape[:-1], 1), jnp.uint32))

        k = jnp.where(top_k > 0, top_k, x.shape[-1])
        kept = order >= largest(lambda t: jnp.sum(order >= t, axis=-1, keepdims=True) >= k)
        mass = jnp.where(kept, jnp.exp(x - jnp.max(x, axis=-1, keepdims=True)), 0.0)
        wanted = top_p * jnp.sum(mass, axis=-1, keepdims=True)
        enough = largest(lambda t: jnp.sum(jnp.where(order >= t, mass, 0.0), axis=-1, keepdims=True) >= wanted)
        kept &= (order >= enough) | (top_p >= 1)
        kept &= mass >= min_p  # the best token's mass is 1
        return part.part(jnp.where(kept, x, -jnp.inf), -1)

    needed = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0))
    return jax.lax.cond(needed, cut, lambda x: x, scaled)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that sort as the float32 values do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def keys(seed: jax.Array, positions: jax.Array, purpose: Purpose) -> jax.Array:
    """One PRNG key per (seed [batch], position [batch, rows], purpose): [batch, rows]."""

    def key(s: jax.Array, p: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(s), p), purpose)

    return jax.vmap(jax.vmap(key, (None, 0)))(seed, positions)


def uniforms(seed: jax.Array, positions: jax.Array, purpose: Purpose) -> jax.Array:
    """Uniform numbers in [0, 1), float32 [batch, rows], keyed as `keys`."""
    return jax.vmap(jax.vmap(lambda k: jax.random.uniform(k)))(keys(seed, positions, purpose))


def sample(
    truncated: jax.Array, sampling: Sampling, positions: jax.Array, purpose: Purpose, part: Cut = Cut()
) -> jax.Array:
    """Draw a token a row from the softmax of truncated logits [batch, rows, vocab]; at temperature 0 take the best.

    Ties go to the lowest id. `positions` [batch, rows] are those the tokens will stand at. Returns [batch, rows] int32.
    """

    def draw(x: jax.Array) -> jax.Array:
        vocab = x.shape[-1] * part.width
        noise = jax.vmap(jax.vmap(lambda k: jax.random.gumbel(k, (vocab,))))(keys(sampling.seed, positions, purpose))
        return x + jnp.where(sampling.temperature[:, None, None] > 0, part.part(noise, -1), 0.0)

    perturbed = jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda x: x, truncated)
    return part.argmax(perturbed)


def probabilities(truncated: jax.Array, sampling: Sampling) -> jax.Array:
    """The distribution that `sample` draws from: [batch, rows, vocab] float32, one-hot at temperature 0."""
    best = jax.nn.one_hot(jnp.argmax(truncated, axis=-1), truncated.shape[-1], dtype=jnp.float32)
    return jnp.where(sampling.temperature[:, None, None] > 0, jax.nn.softmax(truncated, axis=-1), best)


def accept_matching(drafts: jax.Array, targets: jax.Array) -> jax.Array:
    """How many leading drafts equal what the target picked at their positions.

    Args:
        drafts: [batch, rows - 1] int32.
        targets: [batch, rows] int32: the target's own pick after each row, greedy or sampled.

    Returns:
        [batch] int32 in 0 .. rows - 1. The picks up to and including the first mismatch are the output, so its law is
        the target's whatever the drafts are.
    """
    matches = (drafts == targets[:, :-1]).astype(jnp.int32)
    return jnp.sum(jnp.cumprod(matches, axis=1), axis=1)


def accept_rejection(
    p: jax.Array, q: jax.Array, drafts: jax.Array, uniform: jax.Array, final_uniform: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Speculative sampling for drafts drawn from q (Leviathan et al. 2023, Chen et al. 2023).

    Args:
        p: [batch, rows, vocab] float32: the target's distribution after each row.
        q: [batch, rows - 1, vocab] float32: the distributions the drafts were drawn from.
        drafts: [batch, rows - 1] int32.
        uniform: [batch, rows - 1] float32 in [0, 1): draft i is accepted iff it is below min(1, p / q).
        final_uniform: [batch, rows] float32 in [0, 1): that of the row the extra token is drawn at picks it, by inverse
            CDF.

    Returns:
        accepted [batch] int32 in 0 .. rows - 1, and the extra token [batch] int32, drawn from the normalised
        max(p - q, 0) at the first rejected row, or from p's last row if all were accepted.
    """
    at = drafts[..., None]
    p_draft = jnp.take_along_axis(p[:, :-1], at, axis=-1)[..., 0]
    q_draft = jnp.take_along_axis(q, at, axis=-1)[..., 0]
    taken = (uniform < jnp.minimum(1.0, p_draft / q_draft)).astype(jnp.int32)
    accepted = jnp.sum(jnp.cumprod(taken, axis=1), axis=1)

    row = accepted[:, None, None]
    p_row = jnp.take_along_axis(p, row, axis=1)[:, 0]  # [batch, vocab]
    q_row = jnp.take_along_axis(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), row, axis=1)[:, 0]
    residual = jnp.maximum(p_row - q_row, 0.0)
    # p = q up to rounding can leave nothing; then any law is as good, and p is the natural one
    residual = jnp.where(jnp.sum(residual, axis=-1, keepdims=True) > 0, residual, p_row)
    mass = jnp.cumsum(residual, axis=-1)
    final = jnp.take_along_axis(final_uniform, accepted[:, None], axis=1)
    extra = jnp.argmax(mass > final * mass[:, -1:], axis=-1)
    return accepted, extra.astype(jnp.int32)
