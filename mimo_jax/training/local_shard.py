"""Blocks of sequences that are cut over devices: each device draws and trains those that begin in its own part.

A block needs the context keys and values of the window before its anchor. For anchors near the beginning of a part,
these are the neighbour's: either they are fetched once a step (`exchange`), or no such anchor is drawn (`skip`). Both
give a block what it has in a whole sequence. Where parts are much longer than windows, skipping loses few anchors and
sends nothing at all.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from mimo_jax.cache import SequenceKV
from mimo_jax.config import DrafterConfig
from mimo_jax.drafter import Drafter
from mimo_jax.training import TrainingError
from mimo_jax.training.groups import Groups

Edges = Literal["exchange", "skip"]
"""What is done about anchors whose window or labels reach beyond their device's part."""


def skipped(config: DrafterConfig, groups: Groups, edges: Edges) -> tuple[int, int]:
    """How many of the first and of the last positions of a part are no anchors, where there is a part beyond.

    Raises:
        TrainingError: All of them, as the drafter has no window.
    """
    if edges == "exchange" or not groups.sequence.axes:
        return 0, 0
    if config.attention.visible_keys is None:
        raise TrainingError("a drafter without a window needs every position before a block: edges cannot be skipped")
    return config.attention.visible_keys - 1, config.block_size - 1


def drawable(skip: tuple[int, int], groups: Groups, length: int) -> jax.Array:
    """Which positions of a sequence are far enough from the edges of their part, [length] bool.

    Args:
        skip: See `skipped`.
        groups: Of the mesh.
        length: Of a whole sequence.
    """
    part = length // groups.sequence.width
    at = jnp.arange(length, dtype=jnp.int32)
    within = at % part
    return ((within >= skip[0]) | (at < part)) & ((within < part - skip[1]) | (at >= length - part))


def context(drafter: Drafter, captured: jax.Array, positions: jax.Array, groups: Groups, edges: Edges) -> SequenceKV:
    """Context keys and values that this device's blocks may see.

    Args:
        drafter: Bound.
        captured: [batch, part, captured layers, hidden] features of this device's positions.
        positions: [batch, length] int32: where each of a row stands in its document, as `Groups.ids` says.
        groups: Of the mesh.
        edges: Whether those of the window before them are fetched.
    """
    batch, part = captured.shape[:2]
    first, positions = groups.first(part), groups.sequence.part(positions, 1)
    # positions start again with every document, so each is given its own
    kv = drafter.context(captured.reshape(batch * part, 1, *captured.shape[2:]), positions.reshape(-1))
    k, v = (x.reshape(x.shape[0], batch, part, *x.shape[3:]) for x in kv)
    if edges == "skip" or not groups.sequence.axes:
        return SequenceKV(k, v, first)
    beyond = part * (groups.sequence.width - 1)
    if (visible := drafter.config.attention.visible_keys) is not None:
        beyond = min(beyond, visible - 1)
    both = jnp.concatenate([k, v], axis=-1)  # one message
    both = jnp.concatenate([groups.sequence.before(both, beyond, 2), both], axis=2)
    k, v = jnp.split(both, [k.shape[-1]], axis=-1)
    return SequenceKV(k, v, first - beyond)
