"""The FP8 linear layer against float64 NumPy, on every backend that runs here."""

import functools
import operator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_linear import fp8_linear, mosaic_gpu

LAYERS, LAYER = 3, 1


def make(inputs, outputs, tile, rng):
    """Values and scales of a stack, and one layer's weight in float64."""
    values = (50 * rng.standard_normal((LAYERS, outputs, inputs))).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.001, 0.02, (LAYERS, outputs // tile, -(-inputs // 128))).astype(np.float32)
    tiles = np.repeat(np.repeat(scales[LAYER], tile, 0), 128, 1)[:, :inputs]
    return jnp.asarray(values), jnp.asarray(scales), tiles * values[LAYER].astype(np.float64)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("lead", "inputs", "outputs", "tile"), [((2, 3), 128, 256, 128), ((1,), 200, 64, 64), ((100,), 256, 192, 64)]
)
def test_on_a_cpu(lead, inputs, outputs, tile, dtype, backend, rng):
    values, scales, weight = make(inputs, outputs, tile, rng)
    x = jnp.asarray(rng.standard_normal((*lead, inputs)), dtype)
    out = jax.jit(functools.partial(fp8_linear, backend=backend))(x, values, scales, layer=jnp.int32(LAYER))
    assert out.dtype == x.dtype
    reference = np.asarray(x.astype(jnp.float32), np.float64) @ weight.T
    error = np.linalg.norm(np.asarray(out.astype(jnp.float32)) - reference) / np.linalg.norm(reference)
    assert error <= (1e-6 if dtype == "float32" else 4e-3)


@pytest.mark.parametrize(
    ("lead", "inputs", "outputs", "tile"),
    [
        ((5,), 384, 128, 64),
        pytest.param((1,), 128, 64, 64, marks=pytest.mark.slow),
        pytest.param((2, 9), 256, 256, 128, marks=pytest.mark.slow),
    ],
)
def test_interpreted(lead, inputs, outputs, tile, rng):
    """The kernel but for its decoding and its kind of product, and no race found in it."""
    values, scales, weight = make(inputs, outputs, tile, rng)
    x = jnp.asarray(rng.standard_normal((*lead, inputs)), jnp.bfloat16)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    out = mosaic_gpu.fp8_linear(x, values, scales, jnp.int32(LAYER), interpret=interpret)
    reference = np.asarray(x.astype(jnp.float32), np.float64) @ weight.T
    assert np.linalg.norm(np.asarray(out.astype(jnp.float32)) - reference) <= 4e-3 * np.linalg.norm(reference)
    assert gpu_callbacks.get_races().races_found is False


def test_instructions_give_the_value_of_every_byte(rng):
    """The kernel's shifts and masks on four bytes at a time, in NumPy: every byte in every place."""
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    numbers = np.isfinite(expected)
    places = [rng.permutation(256) for _ in range(4)]
    words = np.bitwise_or.reduce([p.astype(np.uint32) << 8 * i for i, p in enumerate(places)])
    for first, fields in enumerate((mosaic_gpu.EVEN, mosaic_gpu.ODD)):
        parts = [(words << by if by >= 0 else words >> -by) & np.uint32(mask << 16 | mask) for by, mask in fields]
        bits = functools.reduce(operator.or_, parts)
        for half, place in ((bits & 0xFFFF, places[first]), (bits >> 16, places[first + 2])):
            got = (half << 16).astype(np.uint32).view(np.float32).astype(np.float64) * 2.0**120
            np.testing.assert_array_equal(got[numbers[place]], expected[place][numbers[place]])


@pytest.mark.parametrize(
    ("dtype", "rows", "inputs", "outputs", "tile", "message"),
    [
        ("float32", 8, 128, 128, 128, "must be bfloat16, not float32"),
        ("bfloat16", 8, 200, 128, 128, "inputs must be a multiple of 128 .* not 200"),
        ("bfloat16", 8, 128, 96, 32, "rows of a scale of 64, not .* 32"),
        ("bfloat16", 65, 128, 128, 128, "65 rows are more than 64"),
    ],
)
def test_refuses(dtype, rows, inputs, outputs, tile, message, rng):
    values, scales, _ = make(inputs, outputs, tile, rng)
    with pytest.raises(NotImplementedError, match=message):
        fp8_linear(jnp.zeros((rows, inputs), dtype), values, scales, layer=0, backend="mosaic_gpu")


@pytest.mark.parametrize("rows", [8, 16, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(6144, 3072), (6144, 192), (6144, 128), (2048, 6144), (4096, 24576)])
def test_parts_fit_and_are_enough(rows, inputs, outputs):
    parts = mosaic_gpu.choose_parts(rows, inputs, outputs)
    blocks = inputs // 128
    assert blocks % parts == 0
    assert blocks // parts * 128 * (64 + 2 * rows) + 64 * rows * 4 <= 225 * 1024
    assert parts == blocks or parts * outputs // 64 >= mosaic_gpu.PROGRAMS
