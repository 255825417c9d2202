"""How many pages and snapshots fit: the arithmetic between a memory fraction and a scheduler's sizes."""

import math
from functools import partial
from typing import Any

import jax

from mimo_jax.model import Model, available_memory
from mimo_jax.slots import build_slots
from serve.engine.scheduler import Sizes
from serve.options import ServerOptions
from sharding.distributed import least

SMALL_CHUNK = 64
"""Prompt tokens of the smallest prefill programs, one of which takes several rows at a time."""
SNAPSHOTS_A_SLOT = 8
"""Snapshots at most, where nothing is said."""
SNAPSHOT_SHARE = 0.25
"""Of the memory for caches, at most, where nothing is said."""


def plan_sizes(model: Model, options: ServerOptions) -> Sizes:
    """Sizes that fit the devices.

    Args:
        model: Loaded: what its weights take is gone already.
        options: Limits and wishes.

    Raises:
        MemoryError: Not one request of the whole context fits; the message has the arithmetic.
    """
    groups = model.models.topology.data_parallel
    slots = -(-options.max_running_requests // groups)
    size, context = options.page_size, options.context_length
    columns = -(-context // size)

    def nbytes(pages: int, snapshots: int) -> int:
        return _device_bytes(
            model, slots * groups, context, page_size=size, pages=pages * groups, snapshots=snapshots * groups
        )

    base = nbytes(1, 1)
    page, snapshot = nbytes(2, 1) - base, nbytes(1, 2) - base
    left = _memory(options) - (base - page - snapshot)
    wanted = 0 if options.disable_radix_cache else options.max_snapshots
    snapshots = SNAPSHOTS_A_SLOT * slots if wanted is None else wanted
    if wanted is None:
        snapshots = max(0, min(snapshots, int(left * SNAPSHOT_SHARE) // snapshot))
    # twice what all slots can use leaves as much again to prefixes; more would only be slower to look at
    pages = min((left - snapshots * snapshot) // page, 2 * slots * columns)
    if options.max_total_tokens is not None:
        pages = min(pages, options.max_total_tokens // size)
    if pages < columns and options.max_total_tokens is None:
        raise MemoryError(
            f"{max(left, 0):,} bytes a device are left for pages and snapshots after weights and {slots} slots, and "
            f"one request of {context:,} tokens needs {columns * page:,}; lower --context-length or "
            "--max-running-requests, or raise --mem-fraction-static"
        )
    return Sizes(
        groups=groups,
        slots=slots,
        pages=pages,
        page_size=size,
        snapshots=snapshots,
        slack=options.block_size,
        verify_length=options.verify_length,
        rounds=options.rounds_per_dispatch,
        prefills=prefill_sizes(options.chunked_prefill_size, slots),
    )


def prefill_sizes(chunk: int, slots: int) -> tuple[tuple[int, int], ...]:
    """(rows, tokens) that prefill programs are compiled for: few, none over four times as long as the next.

    The smallest takes one prompt or several.

    Args:
        chunk: Prompt tokens that a step takes at most; a power of two.
        slots: Rows there are.
    """
    small = min(SMALL_CHUNK, chunk)
    sizes = {(1, small), (min(slots, max(1, chunk // small), 4), small)}
    while chunk > small:
        sizes.add((1, chunk))
        chunk //= 4
    return tuple(sorted(sizes, key=lambda size: size[::-1]))


def _device_bytes(model: Model, slots: int, capacity: int, **sizes: int) -> int:
    """Bytes of empty slots on the device that holds most of them."""
    shapes: Any = model.shaped(jax.eval_shape(partial(build_slots, model, slots, capacity, **sizes)))
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(shapes))


def _memory(options: ServerOptions) -> int:
    """Bytes that caches may take of a device, of any process: the fraction, less what is in use."""
    share, devices = options.mem_fraction_static, jax.local_devices()
    if options.platform == "cpu":  # host memory, which the weights have their part of already
        left = int(available_memory() * share) // len(devices)
    else:
        stats = [device.memory_stats() or {} for device in devices]
        left = min(int(s["bytes_limit"] * share) - s["bytes_in_use"] for s in stats)
    return least(left)  # programs have the same sizes everywhere
