"""Stored weights as arrays on devices: block by block, straight into the final sharding.

A leaf of the parameter tree stacks many stored weights. The rows of it that devices of this process own are read by
byte ranges into a buffer of bounded size, decoded on the way if they are to be expanded, and written into the devices'
arrays before the next are read. So the host holds a constant number of bytes, whatever the size of the model.

Rows are read whole, also where this process owns only some of their columns: where several processes cut a weight by
columns (o without DP attention, down of sliced experts). The release's rows have 1 to 32 kB, and on a local disk a
request for half of each took more time than one for all of many: 9 times as much at 1 kB, 1.6 times at 32 kB.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mimo_jax.quantization import FP8BlockWeight, MXFP4Weight
from mimo_jax.safetensors_reader import CheckpointError
from mimo_jax.stored_weights import Leaf, StoredWeight
from pallas_kernels.fp8 import COLUMNS as FP8_COLUMNS

Sharding = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]
"""From the logical axes and the shape of an array to where it lives."""
Progress = Callable[[int], None]
"""Told how many more bytes of the checkpoint have been read."""

Ranges = tuple[tuple[int, int], ...]
"""Half-open, one an axis."""

PIECE_BYTES = 1 << 26
"""What is read before it is handed to the devices."""
STRIP_BYTES = 1 << 23
"""What one reader reads and decodes at a time."""

ReadRows = Callable[[StoredWeight, np.ndarray, int, int], None]


class Placer:
    """Reads leaves into device arrays, piece by piece, with several readers."""

    def __init__(self, sharding: Sharding | None, progress: Progress | None, readers: int):
        self._sharding = sharding
        self._progress = progress or (lambda _: None)
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="checkpoint-reader")

    def __enter__(self) -> "Placer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def place(
        self,
        leaf: Leaf,
        inner: tuple[int, ...],
        dtype: np.dtype,
        axes: tuple[str, ...],
        read: ReadRows,
        row_bytes: int | None,
    ) -> jax.Array:
        """An array [*leaf.lead, *inner] whose last axes `read` fills, whole rows at a time.

        Args:
            leaf: What is read.
            inner: [rows, ...] of what one source gives.
            dtype: Of the array.
            axes: Logical names of its axes.
            read: Fills rows start .. stop of one source.
            row_bytes: What one of these rows counts for in progress; None: all that is stored of it.
        """
        shape = (*leaf.lead, *inner)
        sharding = self._where(axes, shape)
        arrays: list[jax.Array] = []
        for rows, columns in _owners(sharding, shape, len(leaf.lead) + 1).items():
            read_rows = partial(self._read, leaf, read, row_bytes)
            arrays += _fill(rows, columns, inner[1:], dtype, read_rows)
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _read(self, leaf: Leaf, read: ReadRows, row_bytes: int | None, rows: Ranges, out: np.ndarray) -> None:
        """Fill `out` with a range of every leading axis and of rows."""
        for done in self._run(_jobs(leaf, rows, out, read, row_bytes)):
            self._progress(done)

    def local_matrix(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Rows and columns that a device has of an array [..., rows, columns]."""
        return self._where(axes, shape).shard_shape(shape)[-2:]

    def put(self, values: np.ndarray, axes: tuple[str, ...]) -> jax.Array:
        """An array that is already in memory."""
        return jax.device_put(values, self._where(axes, values.shape))

    def _where(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
        if self._sharding is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return self._sharding(axes, shape)

    def _run(self, jobs: Iterable[Callable[[], int]]) -> Iterator[int]:
        for batch in itertools.batched(jobs, 1024):
            yield from self._pool.map(lambda job: job(), batch)


class Outliner(Placer):
    """Gives the shapes, dtypes and shardings of what a `Placer` would give, and reads nothing."""

    def __init__(self, sharding: Sharding | None):
        super().__init__(sharding, None, 1)
        self.nbytes = 0
        """What a `Placer` would have reported as progress."""

    def place(
        self,
        leaf: Leaf,
        inner: tuple[int, ...],
        dtype: np.dtype,
        axes: tuple[str, ...],
        read: ReadRows,
        row_bytes: int | None,
    ) -> Any:
        """The `jax.ShapeDtypeStruct` of the array."""
        shape = (*leaf.lead, *inner)
        sharding = self._where(axes, shape)
        for rows in _owners(sharding, shape, len(leaf.lead) + 1):
            first, last = rows[-1]
            for _, source in _sources(leaf, rows):
                self.nbytes += (last - first) * (source.row_bytes if row_bytes is None else row_bytes)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def put(self, values: np.ndarray, axes: tuple[str, ...]) -> Any:
        """The `jax.ShapeDtypeStruct` of the array."""
        return jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=self._where(axes, values.shape))


def load_leaf(leaf: Leaf, dtype: np.dtype, packed: bool, placer: Placer, axes: tuple[str, ...]) -> Any:
    """Read a leaf.

    Args:
        leaf: What is read.
        dtype: Of the values where they are plain or expanded.
        packed: Keep the stored format; all sources must then have the same.
        placer: Where arrays go.
        axes: Logical names of the axes of its shape.

    Returns:
        An array, or an `MXFP4Weight` or `FP8BlockWeight`.
    """
    source, format = leaf.sources[0], leaf.sources[0].format if packed else "plain"
    if format == "mxfp4":
        codes, scales = source.tensor.shape[1], source.scales[0].shape[1]
        rows, byte = source.shape[0], np.dtype(np.uint8)
        return MXFP4Weight(
            placer.place(leaf, (rows, codes), byte, axes, StoredWeight.read_values, codes),
            placer.place(leaf, (rows, scales), byte, axes, StoredWeight.read_mxfp4_scales, scales),
        )
    if format == "fp8":
        rows, columns = source.shape
        tile = math.gcd(*(s.rows.tile for s in {id(s.rows): s for s in leaf.sources}.values() if s.rows))
        local_rows, local_columns = placer.local_matrix(axes, leaf.shape)
        tile = math.gcd(tile, local_rows)  # no tile is cut
        if local_columns != columns and local_columns % FP8_COLUMNS:
            raise CheckpointError(
                f"{'/'.join(leaf.path)}: {local_columns} of {columns} columns on a device would cut tiles of "
                f"{FP8_COLUMNS} FP8 columns; load with expanded storage, or cut it into fewer parts"
            )

        def tile_scales(weight: StoredWeight, out: np.ndarray, start: int, stop: int) -> None:
            weight.read_tile_scales(out, start, stop, tile)

        tiles = (rows // tile, math.ceil(columns / FP8_COLUMNS))
        return FP8BlockWeight(
            placer.place(
                leaf, (rows, columns), np.dtype(ml_dtypes.float8_e4m3fn), axes, StoredWeight.read_values, columns
            ),
            placer.place(leaf, tiles, np.dtype(np.float32), axes, tile_scales, 0),
        )
    return placer.place(leaf, source.shape, dtype, axes, StoredWeight.read_expanded, None)


def _owners(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...], depth: int
) -> dict[Ranges, dict[Ranges, list[jax.Device]]]:
    """The devices of this process by the ranges that they own of the first `depth` axes, and of the others."""
    owners: dict[Ranges, dict[Ranges, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        block = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        owners.setdefault(block[:depth], {}).setdefault(block[depth:], []).append(device)
    return owners


def _fill(
    rows: Ranges,
    columns: dict[Ranges, list[jax.Device]],
    width: tuple[int, ...],
    dtype: np.dtype,
    read: Callable[[Ranges, np.ndarray], None],
) -> list[jax.Array]:
    """The arrays of the devices that own some rows, each perhaps only some of their columns.

    Rows are read whole and once, as they lie in the file.

    Args:
        rows: Ranges of the leading axes and of rows.
        columns: Devices by the ranges of the other axes that they own.
        width: Sizes of the other axes.
        dtype: Of the arrays.
        read: Fills a buffer with some of the rows.
    """
    row_bytes = math.prod(width) * dtype.itemsize
    cut = any(_sizes(owned) != width for owned in columns)
    if not cut and all(device.platform == "cpu" for devices in columns.values() for device in devices):
        pieces = [rows]  # the buffer becomes the array, without a copy
    else:
        pieces = list(_pieces(rows, row_bytes))
    buffer = _aligned(max(math.prod(_sizes(p)) for p in pieces) * row_bytes).view(dtype).reshape(-1, *width)
    arrays: dict[jax.Device, jax.Array] = {}
    for piece in pieces:
        sizes = _sizes(piece)
        part = buffer[: math.prod(sizes)].reshape(*sizes, *width)
        read(piece, part)
        for owned, devices in columns.items():
            mine = np.ascontiguousarray(part[(..., *(slice(*bounds) for bounds in owned))])
            for device in devices:
                given = jax.device_put(mine, device)
                if len(pieces) > 1:
                    if device not in arrays:
                        arrays[device] = jnp.zeros((*_sizes(rows), *_sizes(owned)), dtype, device=device)
                    start = [np.int32(a - b) for (a, _), (b, _) in zip(piece, rows, strict=True)]
                    given = _write(arrays[device], given, (*start, *(np.int32(0) for _ in owned)))
                arrays[device] = given
        # Only then may the buffer be filled again.
        jax.block_until_ready(list(arrays.values()))
    return list(arrays.values())


@partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, piece: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, piece, start)


def _pieces(rows: Ranges, row_bytes: int) -> Iterator[Ranges]:
    """Cut the ranges, outer axes first, into equal pieces of at most `PIECE_BYTES`, or of one row."""
    inside = [math.prod(_sizes(rows[i + 1 :])) * row_bytes for i in range(len(rows))]
    axis = next((i for i, nbytes in enumerate(inside) if nbytes <= PIECE_BYTES), len(rows) - 1)
    first, last = rows[axis]
    count = max(1, math.ceil((last - first) * inside[axis] / PIECE_BYTES))
    step = max(1, math.ceil((last - first) / count))
    for position in itertools.product(*(range(*bounds) for bounds in rows[:axis])):
        for start in range(first, max(last, first + 1), step):
            yield (*((p, p + 1) for p in position), (start, min(start + step, last)), *rows[axis + 1 :])


def _aligned(nbytes: int) -> np.ndarray:
    """Memory [bytes] uint8 that a CPU device takes over as it is: it wants a multiple of 64 for an address."""
    raw = np.empty(nbytes + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + nbytes]


def _sizes(ranges: Ranges) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in ranges)


def _sources(leaf: Leaf, rows: Ranges) -> Iterator[tuple[tuple[int, ...], StoredWeight]]:
    """The sources in a range of every leading axis, each with its place among them."""
    strides = [math.prod(leaf.lead[i + 1 :]) for i in range(len(leaf.lead))]
    for place in itertools.product(*(range(*bounds) for bounds in rows[:-1])):
        at = tuple(p - start for p, (start, _) in zip(place, rows, strict=False))
        yield at, leaf.sources[sum(p * s for p, s in zip(place, strides, strict=True))]


def _jobs(
    leaf: Leaf, rows: Ranges, buffer: np.ndarray, read: ReadRows, row_bytes: int | None
) -> Iterator[Callable[[], int]]:
    """Reads that together fill a buffer, each a strip of rows of one source; each returns its bytes for progress."""
    first, last = rows[-1]
    strip = max(1, STRIP_BYTES // max(1, math.prod(buffer.shape[len(rows) :]) * buffer.dtype.itemsize))

    def job(source: StoredWeight, out: np.ndarray, start: int, stop: int) -> int:
        read(source, out, start, stop)
        return (source.row_bytes if row_bytes is None else row_bytes) * (stop - start)

    for at, source in _sources(leaf, rows):
        into = buffer[at]
        for start in range(first, last, strip):
            stop = min(start + strip, last)
            yield lambda s=source, o=into[start - first : stop - first], a=start, b=stop: job(s, o, a, b)
