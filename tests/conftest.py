"""Shared by all tests: sixteen CPU devices, strict promotion, seeds and golden folders."""

import filecmp
import gc
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"
DEVICE_COUNT = 16

# Both must stand before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
_given = os.environ.get("XLA_FLAGS", "").split()
_kept = [flag for flag in _given if "xla_force_host_platform_device_count" not in flag]
# Tests compile many programs and run each briefly: cheap code generation halves their time and changes no arithmetic
# that a tolerance does not cover.
_ours = [f"--xla_force_host_platform_device_count={DEVICE_COUNT}", "--xla_backend_optimization_level=0"]
os.environ["XLA_FLAGS"] = " ".join([*_kept, *_ours])

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Executables read back from a compilation cache have crashed XLA:CPU: every process compiles its own.
jax.config.update("jax_enable_compilation_cache", False)


def golden_roots() -> list[Path]:
    """The golden folders to test against: the repository's own and a fuller set where there is one.

    The fuller set is the folder named by MIMO_JAX_GOLDEN, else `shared/golden` beside the repository if it exists.
    """
    named = os.environ.get("MIMO_JAX_GOLDEN")
    if named and not Path(named).is_dir():
        raise pytest.UsageError(f"MIMO_JAX_GOLDEN names no folder: {named}")
    extra = Path(named) if named else REPOSITORY.parent / "shared" / "golden"
    return [GOLDEN, extra] if extra.is_dir() else [GOLDEN]


def golden_folders(kind: str) -> list[Path]:
    """Every folder of one kind (`backbone_tiny_f32`, or a pattern such as `backbone_*`) in every golden root.

    Meant for `pytest.mark.parametrize`: raises if there is none, so that a test never passes for want of data.
    """
    found = [folder for root in golden_roots() for folder in sorted(root.glob(kind)) if folder.is_dir()]
    # a fuller copy of a set stands in for the repository's own
    found = [f for f in found if not any(f != g and _is_part_of(f, g) for g in found)]
    if not found:
        raise pytest.UsageError(f"no golden folder {kind} under {', '.join(map(str, golden_roots()))}")
    return found


def _is_part_of(folder: Path, other: Path) -> bool:
    """Whether `folder` is the repository's and every input in it is in `other`, byte for byte."""
    if not folder.is_relative_to(GOLDEN) or other.is_relative_to(GOLDEN) or folder.name != other.name:
        return False
    inputs = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("golden.safetensors", "README.txt")
    ]
    return all((other / p).is_file() and filecmp.cmp(folder / p, other / p, shallow=False) for p in inputs)


def golden_id(folder: Path) -> str:
    """A test id that tells the repository's copy from others: `tests/golden/x` -> `x`, elsewhere -> `shared-x`."""
    return folder.name if folder.is_relative_to(GOLDEN) else f"{folder.parent.parent.name}-{folder.name}"


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs() -> Iterator[None]:
    """Drop a file's compiled programs when it is done.

    XLA:CPU maps several pieces of memory per program, Linux allows a process 65,530 of them by default, and a
    process that runs out dies inside the compiler.
    """
    yield
    if models := sys.modules.get("tests.models"):  # models keep their own
        models.golden_model.cache_clear()
        models.counter.cache_clear()
    gc.collect()
    jax.clear_caches()


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """What a launch in this process configures ends with its test, as does the stream that it logs to."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The golden data that is part of the repository."""
    return GOLDEN


@pytest.fixture
def seed() -> int:
    """A seed that pytest shows when the test fails; MIMO_JAX_TEST_SEED repeats or changes a run."""
    value = int(os.environ.get("MIMO_JAX_TEST_SEED", "20260"))
    print(f"MIMO_JAX_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """NumPy's generator from `seed`."""
    return np.random.default_rng(seed)


@pytest.fixture
def address():
    """A host and port with a free one above it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return f"127.0.0.1:{port}"
            except (OSError, OverflowError):
                continue
