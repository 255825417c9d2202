"""Logits of given tokens and block logits of given features: what one implementation is held against another by."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.cache import BackboneCache, RingKV, backbone_cache, ring_slots
from mimo_jax.model import Model
from mimo_jax.request import check_ids
from mimo_jax.speculative import ModelParams, Models, PromptChunk

_PADDED = 256  # answers are scored at multiples of this length, so that few programs are compiled


def score(
    model: Model, ids: np.ndarray, *, chunk: int | None = None, hidden_states: bool = False
) -> dict[str, np.ndarray]:
    """Teacher-forced logits of every position.

    Args:
        model: A loaded model.
        ids: [batch, positions] token ids.
        chunk: Run through the caches, this many positions at a time. Default: one full forward pass.
        hidden_states: Give the residual stream too.

    Returns:
        `logits` [batch, positions, vocab] float32 and, if asked, `hidden_states` [layers + 1, batch, positions, hidden]
        float32: the embeddings first, then the residual stream after each layer, before any final norm.

    Raises:
        ValueError: The ids are not a matrix, are outside the vocabulary, or are longer than the context.
    """
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be an integer matrix [batch, positions], not {ids.dtype} {list(ids.shape)}")
    config, (batch, positions) = model.config, ids.shape
    if positions > config.max_positions:
        raise ValueError(f"{positions} positions are more than the model's context of {config.max_positions}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    check_ids(np.unique(ids).tolist(), config.vocab_size, "ids")
    capture = tuple(range(len(config.layers))) if hidden_states else ()
    step = positions if chunk is None else chunk
    groups = model.models.topology.data_parallel
    rows = -(-batch // groups) * groups
    # a full forward reads nothing from the caches; their least room, since no argument may be empty (`request._padded`)
    capacity = 1 if chunk is None else positions
    cache = model.made(partial(backbone_cache, config, rows, capacity, 1, model.dtype, groups=groups))

    logits, hidden = [], []
    for start in range(0, positions, step):
        part = ids[:, start : start + step].astype(np.int32)
        count = part.shape[1]
        padded: Any = np.pad(part, ((0, rows - batch), (0, step - count)))
        counts: Any = np.full(rows, count, np.int32)
        arguments = cache, model.placed(PromptChunk(padded, counts, counts == 0))
        cache, (scored, states) = model.compiled(_forward, arguments, {"capture": capture})(model.params, *arguments)
        logits.append(np.asarray(scored)[:batch, :count])
        hidden.append(np.asarray(states)[:, :batch, :count])
    result = {"logits": np.concatenate(logits, axis=1)}
    if hidden_states:
        result["hidden_states"] = np.concatenate(hidden, axis=2)
    return result


def log_probabilities(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """The backbone's log-probabilities [answer, vocab] float64 at which an answer's tokens stand."""
    ids = [*prompt, *answer[:-1]]
    padded = np.zeros((1, -(-len(ids) // _PADDED) * _PADDED), np.int64)
    padded[0, : len(ids)] = ids
    logits = score(model, padded)["logits"][0, len(prompt) - 1 : len(ids)].astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames=("models", "capture"))
def _forward(
    models: Models,
    params: ModelParams,
    cache: BackboneCache,
    chunk: PromptChunk,
    *,
    capture: tuple[int, ...],
) -> tuple[BackboneCache, tuple[jax.Array, jax.Array]]:
    backbone, topology = models.backbone.bind(params.backbone), models.topology
    output = backbone(chunk.tokens, cache, capture)
    embedded = backbone.embed(chunk.tokens)[:, :, None]
    states = jnp.concatenate([embedded, output.captured], axis=2) if capture else output.captured
    states = topology.cut("batch").gather(jnp.moveaxis(states, 2, 0).astype(jnp.float32), 1)
    logits = topology.cut("logits").gather(backbone.logits(output.hidden), -1)
    return cache.commit(output.kv, chunk.counts), (topology.cut("batch").gather(logits, 0), states)


def score_draft(
    model: Model, features: np.ndarray, anchors: np.ndarray, positions: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The drafter's view of given blocks.

    Args:
        model: A loaded model with a drafter.
        features: [batch, context, captured layers * hidden]: the backbone's residual stream after each captured layer,
            concatenated, at positions 0 .. context - 1.
        anchors: [batch] token ids, each block's first and known token.
        positions: [batch]: where the anchors stand; a block sees the features of earlier positions only. Default: the
            number of features.

    Returns:
        `logits` [batch, block, vocab] float32 (row r for the token at the anchor's position + r; row 0 means nothing)
        and `hidden` [batch, block, hidden] float32 after the drafter's final norm.

    Raises:
        ValueError: There is no drafter, or shapes, ids or positions do not fit.
    """
    config = model.drafter_config
    if config is None:
        raise ValueError("this model has no drafter: give one with --drafter")
    width = len(config.target_layer_ids) * config.hidden_size
    if features.ndim != 3 or features.shape[-1] != width:
        raise ValueError(f"features must be [batch, context, {width}], not {list(features.shape)}")
    batch, context = features.shape[:2]
    positions = np.full(batch, context) if positions is None else positions
    whole = all(np.issubdtype(a.dtype, np.integer) for a in (anchors, positions))
    if batch == 0 or not whole or anchors.shape != (batch,) or positions.shape != (batch,):
        raise ValueError(
            f"anchors and positions must be integers [{batch}], one a row of features, "
            f"not {list(anchors.shape)} and {list(positions.shape)}"
        )
    if positions.min() < 0 or positions.max() > context:
        raise ValueError(f"positions must lie in 0 .. {context}, the number of features given")
    check_ids(anchors.tolist(), model.config.vocab_size, "anchors")
    arguments = tuple(map(np.asarray, (features, anchors, positions), (model.dtype, np.int32, np.int32)))
    arguments = (None, *map(model.placed, arguments))
    _, (hidden, logits) = model.compiled(_draft, arguments, {})(model.params, *arguments)
    return {"logits": np.asarray(logits), "hidden": np.asarray(hidden)}


@partial(jax.jit, static_argnames="models")
def _draft(
    models: Models, params: ModelParams, _: None, features: jax.Array, anchors: jax.Array, positions: jax.Array
) -> tuple[None, tuple[jax.Array, jax.Array]]:
    backbone, drafter = models.backbone.bind(params.backbone), models.bind_drafter(params)
    config, start = drafter.config, jnp.zeros_like(positions)
    captured = features.reshape(*features.shape[:2], len(config.target_layer_ids), config.hidden_size)
    context = drafter.context(captured, start)
    slots = ring_slots(config.attention.visible_keys, config.block_size, max(1, features.shape[1]))
    ring = RingKV(*(jnp.zeros((*part.shape[:2], slots, *part.shape[3:]), part.dtype) for part in context))
    ring = ring.commit(context, start, positions)
    hidden = drafter(backbone.embed(anchors), ring, positions)
    logits = models.topology.cut("logits").gather(backbone.head(hidden), -1)
    return None, (hidden.astype(jnp.float32), logits)
