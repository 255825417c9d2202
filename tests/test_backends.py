"""Which implementation of an op runs."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backends
from pallas_kernels.fp8_linear import fp8_linear, mosaic_gpu, reference


@pytest.fixture
def given(rng):
    x = jnp.asarray(rng.normal(size=(4, 128)), jnp.bfloat16)
    values = jnp.asarray(rng.normal(size=(2, 64, 128)), jnp.float8_e4m3fn)
    return x, values, jnp.ones((2, 1, 1))


def plain(x, weight, layer):
    values, scales = weight
    return reference.fp8_linear(x, values, scales, layer)


@pytest.fixture
def asked():
    yield backends.use
    backends.use("auto")


def test_a_cpu_runs_the_reference(given):
    expected = plain(given[0], given[1:], 1)
    np.testing.assert_array_equal(jax.jit(lambda *a: fp8_linear(*a, layer=1))(*given), expected)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_platform_decides_when_a_program_is_lowered(given, platform):
    lowered = jax.jit(lambda *a: fp8_linear(*a, layer=1)).trace(*given).lower(lowering_platforms=(platform,))
    assert ("mosaic_gpu" in lowered.as_text()) == (platform == "cuda")


def test_what_a_kernel_refuses_runs_as_its_reference_and_the_log_says_so_once(given, caplog):
    x, *weight = given
    backends._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger="pallas_kernels.backends"):
        for _ in range(2):
            out = jax.jit(lambda *a: fp8_linear(*a, layer=0))(x.astype(jnp.float32), *weight)
    np.testing.assert_array_equal(out, plain(x.astype(jnp.float32), weight, 0))
    assert [r.message for r in caplog.records] == [
        "fp8_linear runs as its reference: rows must be bfloat16, not float32"
    ]


def test_what_is_asked_for_is_never_replaced(given, asked):
    x, *weight = given
    with pytest.raises(NotImplementedError, match="not float32"):
        fp8_linear(x.astype(jnp.float32), *weight, layer=0, backend="mosaic_gpu")
    asked("triton")
    with pytest.raises(NotImplementedError, match="fp8_linear has no backend triton"):
        fp8_linear(*given, layer=0)
    asked("reference")
    np.testing.assert_array_equal(fp8_linear(*given, layer=0), plain(given[0], given[1:], 0))


def test_gradients_are_the_references(given, rng):
    x, *weight = given
    direction = jnp.asarray(rng.normal(size=(4, 64)), jnp.bfloat16)
    got, expected = (
        jax.grad(lambda x, f=f: jnp.vdot(f(x), direction))(x)
        for f in (lambda x: fp8_linear(x, *weight, layer=1), lambda x: plain(x, weight, 1))
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("capability", "backend"), [("9.0", "mosaic_gpu"), ("8.0", "triton"), ("10.0", "triton")])
def test_gpus_that_are_no_hopper_take_triton(capability, backend, monkeypatch):
    assert backends.on_gpus() == "mosaic_gpu"  # a machine without GPUs compiles for Hopper
    monkeypatch.setattr(backends.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backends.jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert backends.on_gpus() == backend


def test_a_kernel_is_called_where_it_supports_what_it_is_given(given, monkeypatch):
    called = []
    kernel = mosaic_gpu.fp8_linear
    backends._implementation.cache_clear()
    monkeypatch.setattr(mosaic_gpu, "fp8_linear", lambda *a: called.append(len(a)) or kernel(*a))
    jax.jit(lambda *a: fp8_linear(*a, layer=1))(*given)
    backends._implementation.cache_clear()
    assert called == [4]
