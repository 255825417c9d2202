"""Which implementation of an op runs: decided by platform when a program is lowered, unless one is asked for by name.

An op is a folder: its public function, `reference.py` in plain `jnp`, and a file for every backend, each with a
function of the op's name and signature. A backend raises NotImplementedError for what it does not support; then the
platform's choice falls back on the reference, and a choice by name fails.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal

import jax

Backend = Literal["auto", "reference", "mosaic_gpu", "triton"]

_log = logging.getLogger(__name__)
_asked: Backend = "auto"


def use(backend: Backend) -> None:
    """Ask for a backend, in programs traced from now on, wherever an op is not told another."""
    global _asked
    _asked = backend


def run(op: str, backend: Backend | None, *arrays: Any, **static: Any) -> Any:
    """Run an op.

    Args:
        op: Its name, which is its folder's.
        backend: None: what `use` asked for.
        arrays: Its arguments that are arrays, or None.
        static: The others.

    Raises:
        NotImplementedError: The backend that was asked for has no such op, or does not support these arguments.
    """
    backend = backend or _asked
    reference = partial(_implementation(op, "reference"), **static)
    if backend != "auto":
        return partial(_implementation(op, backend), **static)(*arrays)

    @jax.custom_vjp
    def by_platform(*arrays: Any) -> Any:
        kernel = partial(_implementation(op, on_gpus()), **static)
        return jax.lax.platform_dependent(*arrays, cuda=kernel, default=reference)

    def forward(*arrays: Any) -> Any:
        return by_platform(*arrays), arrays

    def backward(arrays: Any, gradient: Any) -> Any:
        return jax.vjp(reference, *arrays)[1](gradient)

    by_platform.defvjp(forward, backward)
    try:
        return by_platform(*arrays)
    except NotImplementedError as refusal:
        _tell(op, str(refusal))
        return reference(*arrays)


def on_gpus() -> Literal["mosaic_gpu", "triton"]:
    """The backend of programs for GPUs: Mosaic's on Hopper, for which a machine without GPUs compiles, too."""
    if jax.default_backend() != "gpu" or jax.devices()[0].compute_capability.startswith("9."):
        return "mosaic_gpu"
    return "triton"


@cache
def _implementation(op: str, backend: str) -> Callable[..., Any]:
    try:
        module = import_module(f"pallas_kernels.{op}.{backend}")
    except ModuleNotFoundError as error:
        if error.name != f"pallas_kernels.{op}.{backend}":
            raise  # the backend is there, and what it needs is not
        raise NotImplementedError(f"{op} has no backend {backend}") from None
    return getattr(module, op)


@cache
def _tell(op: str, refusal: str) -> None:
    """Say once why an op runs as its reference everywhere."""
    _log.info("%s runs as its reference: %s", op, refusal)
