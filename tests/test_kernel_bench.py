"""`python -m pallas_kernels.bench`."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench.__main__ import CALLS, many
from pallas_kernels.bench.cases import REAL, SMALL, cases


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pallas_kernels.bench", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_small_shapes_on_any_machine(tmp_path):
    done = run("--small", "--runs", "1", "--json", f"{tmp_path}/b.json", "--plot", f"{tmp_path}/b.png")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert (tmp_path / "b.png").stat().st_size > 10_000
    assert {t["op"] for t in found["timings"]} == {c.op for c in cases(SMALL)}
    for timing in found["timings"]:
        ours = timing["backend"] in ("mosaic_gpu", "triton")
        assert (timing["refused"] is not None) == ours
        if not ours:
            assert timing["microseconds"] > 0
            assert timing["error"] < 1e-2  # bfloat16 against float32, so no zero either
            assert timing["error"] > 0


def test_says_what_is_missing(tmp_path):
    done = run()
    assert done.returncode != 0
    assert "no GPU here" in done.stderr
    assert "--small" in done.stderr
    assert "no folder" in run("--small", "--json", f"{tmp_path}/none/b.json").stderr


def test_a_program_calls_every_layer():
    """Each call adds its layer to what the one before left: all count, and none is dropped."""
    seen = many(lambda layer, x, stack: x * 0 + stack[layer], 3)(jnp.zeros(2), jnp.arange(3.0))
    np.testing.assert_array_equal(seen, np.full(2, (CALLS - 1) % 3))


def test_real_cases_count_the_bytes_of_what_is_read():
    eight = next(c for c in cases(REAL) if c.op == "mxfp4 experts" and c.shape.startswith("8 tokens, 48"))
    ids = jnp.asarray(np.minimum(np.arange(64).reshape(8, 8) * 2, 48), jnp.int32)  # 24 experts here, two a token twice
    expert = 3 * 6144 * 2048 * 17 / 32
    assert eight.moved((jnp.zeros(0), ids)) == 24 * expert + 8 * 6144 * 6
    assert eight.flops((jnp.zeros(0), ids)) == 24 * 6 * 6144 * 2048
