"""Where the rows of q, k and v lie in a checkpoint, and which FP8 scale each row has.

The release stores one fused tensor of `num_key_value_heads` chunks, each [its query heads | its key heads | its value
heads], with FP8 scale tiles that start afresh in every chunk. Re-exports store [all Q | all K | all V] under the same
configuration and the same shape. V2-Flash stores q, k and v apart, yet the scales of its full-attention layers were
computed on such chunks before they were cut, so the first rows of a value head use a scale that the file gives to K.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mimo_jax.config import AttentionConfig
from mimo_jax.safetensors_reader import CheckpointError, shorten

QkvLayout = Literal["auto", "chunked", "canonical"]
QKV_LAYOUTS = ("auto", "chunked", "canonical")


@dataclass(frozen=True, eq=False)
class RowMap:
    """Where the rows of a weight, in the model's order, lie in a stored tensor."""

    stored: np.ndarray
    """[rows] int64: row in the stored tensor."""
    scale: np.ndarray
    """[rows] int64: row in the weight's FP8 scales."""

    @property
    def tile(self) -> int:
        """Largest number g of rows such that every g rows, counted from the first, share one scale row."""
        changes = np.flatnonzero(np.diff(self.scale)) + 1
        return math.gcd(len(self.scale), *changes.tolist())

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Rows start .. stop as (row, stored row, count) of consecutive stored rows."""
        stored = self.stored[start:stop]
        cuts = [0, *(np.flatnonzero(np.diff(stored) != 1) + 1).tolist(), len(stored)]
        return [(start + a, int(stored[a]), b - a) for a, b in itertools.pairwise(cuts) if b > a]


def plain_rows(rows: int, block: int) -> RowMap:
    """Rows stored in order, with one scale row for every `block` of them."""
    order = np.arange(rows)
    return RowMap(order, order // block)


def fused_rows(attention: AttentionConfig, chunks: int, block: int, scales_per_chunk: bool) -> tuple[RowMap, ...]:
    """The row maps of q, k and v in a fused tensor of `chunks` chunks; one chunk is the canonical order.

    Args:
        attention: Sizes; the heads of both kinds must divide evenly among the chunks.
        chunks: Number of chunks.
        block: Rows in a scale tile.
        scales_per_chunk: Whether scale tiles start afresh in every chunk, or run through the whole tensor.
    """
    sizes = chunk_rows(attention, chunks)
    length = sum(sizes)
    tiles = math.ceil(length / block)
    maps, first = [], 0
    for size in sizes:
        inside = first + np.arange(size)
        chunk = np.arange(chunks)[:, None]
        stored = (chunk * length + inside).reshape(-1)
        scale = (chunk * tiles + inside // block).reshape(-1) if scales_per_chunk else stored // block
        maps.append(RowMap(stored, scale))
        first += size
    return tuple(maps)


def fused_scale_rows(attention: AttentionConfig, chunks: int, block: int) -> tuple[int, int]:
    """Scale rows of a fused tensor whose tiles start afresh in every chunk, and of one with a single grid."""
    length = sum(chunk_rows(attention, chunks))
    return chunks * math.ceil(length / block), math.ceil(chunks * length / block)


def split_rows(
    attention: AttentionConfig, chunks: int, block: int, scale_rows: tuple[int, int, int] | None
) -> tuple[tuple[RowMap, ...], bool] | None:
    """The row maps of q, k and v that are stored apart, and whether they share their scales.

    Args:
        attention: Sizes.
        chunks: Number of chunks on which scales may have been computed.
        block: Rows in a scale tile.
        scale_rows: Rows of the scales of q, k and v, or None where they are not FP8.

    Returns:
        None if the numbers of scale rows fit neither rule. Otherwise three maps, and False where each counts the rows
        of its own scales; True where scales were computed on chunks and the maps count the rows of all three scales
        put one below another.
    """
    sizes = chunk_rows(attention, chunks)
    total = [size * chunks for size in sizes]
    if scale_rows is None or scale_rows == tuple(math.ceil(rows / block) for rows in total):
        return tuple(plain_rows(rows, block) for rows in total), False
    owned = tiles_of_chunk(sizes, block)
    if scale_rows != tuple(chunks * n for n in owned):
        return None
    # Tile t of a chunk belongs to the projection it starts in; each projection has its tiles of all chunks in order.
    before = np.cumsum([0, *scale_rows])
    owner = np.repeat(np.arange(3), owned)
    position = np.arange(sum(owned)) - np.cumsum([0, *owned])[owner]
    chunk = np.arange(chunks)[:, None]
    maps, start = [], 0
    for size, rows in zip(sizes, total, strict=True):
        tile = (start + np.arange(size)) // block
        scale = before[owner[tile]] + chunk * np.asarray(owned)[owner[tile]] + position[tile]
        maps.append(RowMap(np.arange(rows), scale.reshape(-1)))
        start += size
    return tuple(maps), True


def choose_chunks(asked: QkvLayout, metadata: Mapping[str, Any], kv_heads: int, proven: bool) -> int:
    """How many chunks a checkpoint's fused tensors have; 1 is the canonical order.

    Args:
        asked: What the person asked for.
        metadata: Of the checkpoint's index.
        kv_heads: `num_key_value_heads`: of the full-attention layers, for layers of both kinds.
        proven: Whether FP8 scale rows prove that tiles start afresh in every chunk.

    Raises:
        CheckpointError: It cannot be known, or what is said is contradictory.
    """
    if asked not in QKV_LAYOUTS:
        raise CheckpointError(f"qkv layout must be one of {', '.join(QKV_LAYOUTS)}, not {shorten(asked)}")
    if asked == "canonical" or kv_heads == 1:  # a single chunk is the canonical order
        return 1
    stated = metadata.get("tp_size")
    if stated is not None:
        if not str(stated).isascii() or not str(stated).isdecimal() or int(str(stated)[:20]) != kv_heads:
            raise CheckpointError(
                f"metadata.tp_size is {shorten(stated)}, but fused qkv rows come in num_key_value_heads "
                f"({kv_heads}) chunks; if the file is in [Q|K|V] order, say --qkv-layout canonical"
            )
        return kv_heads
    if asked == "chunked" or proven:
        return kv_heads
    raise CheckpointError(
        f"nothing tells whether the rows of the fused qkv_proj lie in {kv_heads} chunks (as the release "
        f"stores them) or as [Q|K|V] (as some re-exports do): the index has no metadata.tp_size and no FP8 scales "
        f"prove it. Say --qkv-layout chunked or --qkv-layout canonical"
    )


def chunk_rows(attention: AttentionConfig, chunks: int) -> tuple[int, int, int]:
    """Rows of q, k and v in one of `chunks` chunks."""
    return (
        attention.heads // chunks * attention.qk_dim,
        attention.kv_heads // chunks * attention.qk_dim,
        attention.kv_heads // chunks * attention.v_dim,
    )


def tiles_of_chunk(sizes: tuple[int, int, int], block: int) -> tuple[int, int, int]:
    """How many scale tiles of a chunk [q | k | v] start in each of its three parts."""
    q, k, v = sizes
    ends = [math.ceil(rows / block) for rows in (q, q + k, q + k + v)]
    return ends[0], ends[1] - ends[0], ends[2] - ends[1]
