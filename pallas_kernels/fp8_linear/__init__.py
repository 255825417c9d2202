"""A linear layer whose weights stay in FP8."""

import jax

from pallas_kernels import backends
from pallas_kernels.backends import Backend


def fp8_linear(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    layer: jax.Array | int,
    backend: Backend | None = None,
) -> jax.Array:
    """Multiply with one layer's weight of a stack.

    Args:
        x: [..., in].
        values: [layers, out, in] float8_e4m3fn.
        scales: [layers, row tiles, column tiles] float32; row tiles are equally many rows, column tiles 128 columns.
        layer: Scalar int32: the row of the leading axis to use.
        backend: Of `backends.Backend`; None: what `backends.use` asked for.

    Returns:
        [..., out] in x's dtype, accumulated in float32.

    Raises:
        NotImplementedError: The backend that was asked for does not support these arguments.
    """
    return backends.run("fp8_linear", backend, x, values, scales, layer)
