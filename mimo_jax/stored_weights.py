"""Weights as a checkpoint stores them: which rows of which tensors they are, and how these become numbers."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from mimo_jax.qkv_layout import RowMap
from mimo_jax.safetensors_reader import NUMPY_DTYPES, CheckpointError, StoredTensor
from pallas_kernels import mxfp4
from pallas_kernels.fp8 import COLUMNS as FP8_COLUMNS

Format = Literal["plain", "fp8", "mxfp4"]


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One matrix [out, in] or vector [n] of the model in a checkpoint."""

    tensor: StoredTensor
    shape: tuple[int, ...]
    """[out, in] or [n] of the weight itself, which packed codes and fused tensors do not show."""
    format: Format = "plain"
    rows: RowMap | None = None
    """None: in order, and not FP8."""
    scales: tuple[StoredTensor, ...] = ()
    """FP8: float32, put one below another. MXFP4: one tensor of bytes."""
    scale_columns: int = FP8_COLUMNS
    """Columns in a tile of FP8 scales."""

    @property
    def row_bytes(self) -> int:
        """Stored bytes of a row (FP8 scales, a few parts in ten thousand, are not counted)."""
        tensors = (self.tensor, *self.scales) if self.format == "mxfp4" else (self.tensor,)
        return sum(t.nbytes // t.shape[0] for t in tensors)

    def with_copied_heads(self, head_rows: int, times: int) -> "StoredWeight":
        """The weight with every head's rows `times` in a row."""
        order = np.repeat(np.arange(self.shape[0]).reshape(-1, head_rows), times, axis=0).reshape(-1)
        rows = RowMap(order, order) if self.rows is None else RowMap(self.rows.stored[order], self.rows.scale[order])
        return replace(self, shape=(len(order), *self.shape[1:]), rows=rows)

    def read_values(self, out: np.ndarray, start: int, stop: int) -> None:
        """Stored rows start .. stop, in the model's order, into `out` [stop - start, ...]."""
        self._read_rows(self.tensor, out, start, stop)

    def read_mxfp4_scales(self, out: np.ndarray, start: int, stop: int) -> None:
        """Scale bytes of rows start .. stop into `out` [stop - start, in / 32] uint8.

        Raises:
            CheckpointError: A scale is 255, which stands for no number.
        """
        self._read_rows(self.scales[0], out, start, stop)
        if out.size and out.max() == 255:
            raise CheckpointError(f"{self.scales[0].file.path}: {self.scales[0].name}: a scale byte is 255 (NaN)")

    def read_fp8_scales(self) -> np.ndarray:
        """All FP8 scales [scale rows, column tiles] float32.

        Raises:
            CheckpointError: A scale is not finite.
        """
        scales = [tensor.read() for tensor in self.scales]
        for tensor, values in zip(self.scales, scales, strict=True):
            if not np.isfinite(values).all():
                raise CheckpointError(f"{tensor.file.path}: {tensor.name}: a scale is not a finite number")
        return np.concatenate(scales)

    def read_tile_scales(self, out: np.ndarray, start: int, stop: int, tile: int) -> None:
        """FP8 scales of row tiles start .. stop of `tile` rows and of `FP8_COLUMNS` columns each."""
        assert self.rows is not None
        columns = np.arange(out.shape[1]) * FP8_COLUMNS // self.scale_columns
        out[:] = self.read_fp8_scales()[self.rows.scale[start * tile : stop * tile : tile]][:, columns]

    def read_expanded(self, out: np.ndarray, start: int, stop: int) -> None:
        """Rows start .. stop decoded into `out` [stop - start, ...] in its dtype, products rounded once."""
        stored_dtype = NUMPY_DTYPES[self.tensor.dtype]
        if self.format == "plain" and stored_dtype == out.dtype:
            self.read_values(out, start, stop)
            return
        raw = np.empty((stop - start, *self.tensor.shape[1:]), stored_dtype)
        self.read_values(raw, start, stop)
        with np.errstate(over="ignore"):  # a product beyond the format is infinite, as on every other device
            out[:] = self._decode(raw, start, stop).reshape(out.shape).astype(out.dtype)

    def _decode(self, raw: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Stored rows start .. stop as floats, products in float32."""
        if self.format == "plain":
            return raw
        if self.format == "fp8":
            assert self.rows is not None
            scales = self.read_fp8_scales()[self.rows.scale[start:stop]]
            product = raw.astype(np.float32)
            product *= np.repeat(scales, self.scale_columns, axis=1)[:, : self.shape[1]]
            return product
        scale_bytes = np.empty((stop - start, self.scales[0].shape[1]), np.uint8)
        self.read_mxfp4_scales(scale_bytes, start, stop)
        elements, powers = _mxfp4_tables()
        return elements[raw].reshape(*scale_bytes.shape, mxfp4.BLOCK) * powers[scale_bytes][..., None]

    def _read_rows(self, tensor: StoredTensor, out: np.ndarray, start: int, stop: int) -> None:
        runs = [(start, start, stop - start)] if self.rows is None else self.rows.runs(start, stop)
        for row, stored, count in runs:
            tensor.read_into(out[row - start : row - start + count].view(NUMPY_DTYPES[tensor.dtype]), stored)


@cache
def _mxfp4_tables() -> tuple[np.ndarray, np.ndarray]:
    """The two elements of every byte [256, 2] and the value of every scale byte [256], in float32."""
    values = np.concatenate([mxfp4.MAGNITUDES, -mxfp4.MAGNITUDES])
    byte = np.arange(256)
    powers = np.ldexp(np.ones(256, np.float32), np.minimum(byte - 127, 127))
    return np.stack([values[byte & 15], values[byte >> 4]], axis=-1), powers


@dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter tree and the stored weights it stacks."""

    path: tuple[str, ...]
    lead: tuple[int, ...]
    """Leading axes, such as (layers, experts, 2)."""
    sources: list[StoredWeight]
    """In row-major order of `lead`; all of one shape."""
    head_rows: int = 0
    """Of K and V: rows of a head."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, not of its packed parts."""
        return (*self.lead, *self.sources[0].shape)

    @property
    def formats(self) -> set[Format]:
        """The stored formats that occur."""
        return {source.format for source in self.sources}

    @property
    def nbytes(self) -> int:
        """Stored bytes of its weights, as `StoredWeight.row_bytes` counts them."""
        return sum(source.row_bytes * source.shape[0] for source in self.sources)

    def fitted(self, shape: tuple[int, ...]) -> "Leaf":
        """The leaf with every KV head as often as a module declares, whose devices share heads."""
        times, rest = divmod(math.prod(shape), math.prod(self.shape))
        if not self.head_rows or times < 2 or rest:
            return self
        return replace(self, sources=[s.with_copied_heads(self.head_rows, times) for s in self.sources])
