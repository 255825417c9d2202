"""Log-probabilities of what was picked, beside the likeliest tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sharding.collectives import Cut


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms under the softmax of a backbone's own logits: temperature 1, nothing added or left out."""

    picked: jax.Array
    """[batch, rows] float32: of the token that was picked."""
    top_ids: jax.Array
    """[batch, rows, top] int32: the likeliest tokens, best first, the lowest id of equal ones first."""
    top: jax.Array
    """[batch, rows, top] float32: theirs."""


def logprobs(logits: jax.Array, tokens: jax.Array, wanted: jax.Array, top: int, part: Cut = Cut()) -> Logprobs:
    """Log-probabilities of a batch's rows; zeros, and no work, if no row wants them.

    Args:
        logits: [batch, rows, vocab] float32, unprocessed.
        tokens: [batch, rows] int32.
        wanted: [batch] bool.
        top: How many of the likeliest.
        part: Which part of the vocabulary the logits are of.
    """

    def compute(x: jax.Array) -> Logprobs:
        size = x.shape[-1]
        first = part.index() * size
        best, at = jax.lax.top_k(x, min(top, size))
        best, ids = part.gather(best, -1), part.gather((at + first).astype(jnp.int32), -1)
        # parts follow each other by id and are sorted alike, so equal values keep the order of ids
        best, at = jax.lax.top_k(best, top)
        ids = jnp.take_along_axis(ids, at, axis=-1)
        highest = best[..., :1]
        total = part.sum(jnp.sum(jnp.exp(x - highest), axis=-1, keepdims=True))
        norm = highest + jnp.log(total)  # [batch, rows, 1]
        local = part.local(tokens, size)[..., None]  # elsewhere: out of range
        mine = jnp.take_along_axis(x, jnp.minimum(local, size - 1), axis=-1)
        picked = part.sum(jnp.where(local < size, mine, 0.0))
        return Logprobs((picked - norm)[..., 0], ids, best - norm)

    def nothing(x: jax.Array) -> Logprobs:
        many = jnp.zeros((*tokens.shape, top), jnp.float32)
        return Logprobs(jnp.zeros(tokens.shape, jnp.float32), many.astype(jnp.int32), many)

    return jax.lax.cond(jnp.any(wanted), compute, nothing, logits)
