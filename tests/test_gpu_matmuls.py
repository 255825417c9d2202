"""The matmul kernels, assembled for an H200 at the sizes of the releases: nothing spills, no weight is copied."""

import re

import jax.numpy as jnp
import pytest

from pallas_kernels.fp8_linear import fp8_linear
from pallas_kernels.interleaved_expert_mlp import interleaved_expert_mlp
from tests.gpu_programs import compile_for_h200

pytestmark = pytest.mark.gpu_compile

LAYERS, TOP_K, ROUTED = 2, 8, 384


def check(program, names, packed):
    """The kernels of Mosaic's, without spills, and no array of the dtypes of packed weights but the parameters."""
    print(program.kernels)
    assert {k.name.removesuffix("_mosaic_gpu_kernel") for k in program.kernels} == names
    assert all(k.spilled_bytes == 0 for k in program.kernels)
    assert "wgmma.mma_async" in program.report
    assert "serialized" not in program.report  # ptxas would make each product wait for the one before
    made = re.findall(rf"%\S+ = (?:{packed})\[[0-9,]+\]\S* ([a-z][\w-]*)\(", program.hlo)
    assert "parameter" in made
    assert set(made) <= {"parameter", "bitcast"}


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts"),
    [
        pytest.param(1, 6144, 2048, 48, id="one token"),
        pytest.param(8, 6144, 2048, 48, id="verify"),
        pytest.param(128, 6144, 2048, 48, id="verify of 16"),
        pytest.param(1024, 6144, 2048, 48, id="a small prompt"),
        pytest.param(8192, 6144, 2048, 48, id="prompts"),
        pytest.param(8, 6144, 2048, 24, id="verify, a sixteenth of Pro"),
        pytest.param(8, 6144, 256, 384, id="verify, slices of eight"),
        pytest.param(8, 6144, 128, 384, id="verify, slices of sixteen"),
        pytest.param(2048, 6144, 128, 384, id="a prompt, slices of sixteen"),
        pytest.param(8, 4096, 2048, 32, id="verify, an eighth of V2.5"),
    ],
)
def test_experts(tokens, hidden, inner, experts):
    def run(*arrays):
        *given, layer = arrays
        return interleaved_expert_mlp(*given, layer=layer, routed=ROUTED)

    program = compile_for_h200(
        run,
        ((tokens, hidden), jnp.bfloat16),
        ((tokens, TOP_K), jnp.int32),
        ((tokens, TOP_K), jnp.float32),
        ((LAYERS, experts, 2, inner, hidden // 4), jnp.int16),
        ((LAYERS, experts, 2, hidden // 128, 4, inner), jnp.uint8),
        ((LAYERS, experts, hidden, inner // 4), jnp.int16),
        ((LAYERS, experts, inner // 128, 4, hidden), jnp.uint8),
        ((), jnp.int32),
    )
    check(program, {"mxfp4_gate_up", "mxfp4_down"}, "s16|u8")
    rows = tokens * TOP_K + min(experts, tokens * TOP_K) * 7 + 136
    assert program.temporary_bytes < 1.2 * rows * (2 * 2 * hidden + 2 * inner) + 1e6  # rows, and nothing of weights


def test_decoding_of_experts_keeps_up_with_memory():
    """64 x 128 weights are 4352 bytes: 234 cycles of a multiprocessor's share of 4.3 TB/s at 1.755 GHz."""
    shapes = ((8, 6144), jnp.bfloat16), ((8, TOP_K), jnp.int32), ((8, TOP_K), jnp.float32)
    weights = ((1, 48, 2, 2048, 1536), jnp.int16), ((1, 48, 2, 48, 4, 2048), jnp.uint8)
    down = ((1, 48, 6144, 512), jnp.int16), ((1, 48, 16, 4, 6144), jnp.uint8)
    program = compile_for_h200(lambda *a: interleaved_expert_mlp(*a, layer=0, routed=ROUTED), *shapes, *weights, *down)
    for name in ("mxfp4_gate_up", "mxfp4_down"):
        inner = program.loops(name)[0]
        blocks = inner["HGMMA"] / 8  # of 128 inputs, 16 a wgmma
        print(name, inner.total(), dict(inner))
        assert blocks == 4
        assert inner.total() / blocks <= 176


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize(
    ("inputs", "outputs", "tile"),
    [
        pytest.param(6144, 3072, 128, id="q, an eighth of Pro"),
        pytest.param(6144, 192, 64, id="k, an eighth of Pro"),
        pytest.param(6144, 128, 64, id="v, an eighth of Pro"),
        pytest.param(2048, 6144, 128, id="dense down, an eighth of Pro"),
    ],
)
def test_fp8_linear(rows, inputs, outputs, tile):
    program = compile_for_h200(
        lambda x, values, scales, layer: fp8_linear(x, values, scales, layer=layer),
        ((rows, inputs), jnp.bfloat16),
        ((LAYERS, outputs, inputs), jnp.float8_e4m3fn),
        ((LAYERS, outputs // tile, inputs // 128), jnp.float32),
        ((), jnp.int32),
    )
    check(program, {"fp8_linear"}, "f8e4m3fn")
    inner = program.loops("fp8_linear")[0]
    assert inner["HGMMA"] == 8
    assert inner.total() <= 441  # 64 x 128 bytes take as many cycles at 4.3 TB/s
