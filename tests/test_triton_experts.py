"""MXFP4 experts in Triton: refusals, the kernel in Triton's interpreter, and what it compiles to."""

import functools
import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import topologies

from pallas_kernels.mxfp4_expert_mlp import mxfp4_expert_mlp, triton
from tests.test_expert_mlp import expected, packed, routing

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def given(hidden, inner, dtype=jnp.bfloat16):
    """Arguments of one token."""
    x, ids, weights = jnp.zeros((1, hidden), dtype), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    shapes = (1, 2, 2, inner, hidden // 2), (1, 2, 2, inner, hidden // 32)
    shapes += (1, 2, hidden, inner // 2), (1, 2, hidden, inner // 32)
    return x, ids, weights, *(jnp.zeros(shape, jnp.uint8) for shape in shapes)


@pytest.mark.parametrize(
    ("hidden", "inner", "dtype", "message"),
    [
        (256, 128, jnp.float32, "must be bfloat16, not float32"),
        (128, 128, jnp.bfloat16, "hidden 128 must be a multiple of 256"),
        (256, 64, jnp.bfloat16, "and inner 64 of 128"),
    ],
)
def test_refuses(hidden, inner, dtype, message):
    with pytest.raises(NotImplementedError, match=message):
        mxfp4_expert_mlp(*given(hidden, inner, dtype), layer=0, backend="triton")


def test_names_the_extra_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(NotImplementedError, match=re.escape("pip install 'mimo-jax[cuda,triton]'")):
        mxfp4_expert_mlp(*given(256, 128), layer=0, backend="triton")


@pytest.mark.parametrize("pairs", [1, 64, 1000, 16384, 65536])
@pytest.mark.parametrize("routed", [1, 48, 384])
def test_tiles_are_no_larger_than_an_even_share_needs(pairs, routed):
    rows = triton.choose_tiling(pairs, routed).rows
    assert rows == 16 or rows // 2 * routed < pairs
    assert rows == 64 or rows * routed >= pairs


@pytest.fixture
def interpreted(monkeypatch):
    """`jax_triton.triton_call` in Triton's interpreter, which lacks bfloat16's constants, products, sums, rounding."""
    pytest.importorskip("triton", reason="the interpreter is Triton's: needs the extra `triton`")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    kernel = importlib.import_module("pallas_kernels.triton_paired_matmul").paired_matmul
    builder, handle, bf16 = interpreter.InterpreterBuilder, interpreter.TensorHandle, language.bfloat16
    multiply = builder.create_fmul

    def values(of):
        return of.data.view(BFLOAT16).astype(np.float32) if of.dtype.scalar == bf16 else of.data

    def bits(numbers):
        return handle(np.asarray(numbers, np.float32).astype(BFLOAT16).view(np.uint16), bf16)

    def product(self, a, b):
        return bits(values(a) * values(b)) if a.dtype.scalar == bf16 else multiply(self, a, b)

    def dot(self, a, b, total, *_):
        return handle(values(a) @ values(b) + total.data, total.dtype.scalar)

    monkeypatch.setattr(builder, "get_bf16", lambda self, value: bits([value]), raising=False)
    monkeypatch.setattr(builder, "create_fp_trunc", lambda self, source, _: bits(source.data))
    monkeypatch.setattr(builder, "create_fmul", product)
    monkeypatch.setattr(builder, "create_dot", dot)
    # arrays are NumPy's, and neither copied there nor back
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, *given: given)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda self, *given: None)

    def call(*arrays, kernel, out_shape, grid, num_warps, num_stages, compute_capability, **constants):
        out = np.full(out_shape.shape, np.nan, out_shape.dtype)
        names = {"bfloat16": "bf16", "uint8": "u8", "int32": "i32"}
        arrays = [*map(np.asarray, arrays), out]
        pointers = [SimpleNamespace(data_ptr=lambda a=a: a.ctypes.data, dtype=names[a.dtype.name]) for a in arrays]
        interpreter.InterpretedFunction(kernel.fn)[grid](*pointers, **constants)
        *_, firsts, sizes, count, _ = arrays
        tiled = np.max(firsts[: count[0]] + sizes[: count[0]], initial=0)
        assert np.isnan(out[tiled:]).all(), "rows of no tile are not written"
        return jnp.asarray(out)

    monkeypatch.setattr(triton, "_triton", lambda: (call, kernel))


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "inner", "kind"),
    [
        (1, 2, 3, 256, 128, "random"),
        (5, 3, 4, 256, 256, "uneven"),
        (21, 2, 3, 512, 128, "one takes all"),
        (70, 3, 3, 256, 128, "last only"),
    ],
)
def test_interpreted(tokens, top_k, experts, hidden, inner, kind, interpreted, rng):
    gate_up_codes, gate_up_scales, gate_up = packed((2, experts, 2, inner, hidden), rng)
    down_codes, down_scales, down = packed((2, experts, hidden, inner), rng)
    x = jnp.asarray(rng.normal(size=(tokens, hidden)) / 4, jnp.bfloat16)
    ids = routing(kind, tokens, top_k, experts, rng)
    ids[-1, -1] = experts  # elsewhere
    weights = rng.uniform(0.1, 1, size=ids.shape).astype(np.float32)
    arrays = x, ids, weights, gate_up_codes, gate_up_scales, down_codes, down_scales
    out = mxfp4_expert_mlp(*map(jnp.asarray, arrays), layer=1, backend="triton")
    weights[-1, -1], ids[-1, -1] = 0, 0
    reference = expected(np.asarray(x.astype(jnp.float32)), ids, weights, gate_up[1], down[1])
    assert np.linalg.norm(out - reference) <= 4e-3 * np.linalg.norm(reference)


@pytest.mark.gpu_compile
@pytest.mark.parametrize(
    ("tokens", "inner", "compute_capability"), [(1, 2048, 90), (1024, 256, 90), (2048, 2048, 90), (2048, 2048, 80)]
)
def test_compiles_without_a_gpu_and_copies_no_weights(tokens, inner, compute_capability):
    pytest.importorskip("jax_triton", reason="needs the extra `triton`: some 640 MB, which .venv-aot does without")
    layers, experts, hidden, top_k = 3, 48, 6144, 8
    described = topologies.get_topology_desc(
        platform="cuda",
        target_config=(Path(__file__).parent / "targets" / "h200.txtpb").read_text(),
        topology="1x1x1",
    )
    device = jax.sharding.SingleDeviceSharding(described.devices[0])
    codes = (layers, experts, 2, inner, hidden // 2), (layers, experts, hidden, inner // 2)
    shapes = [((tokens, hidden), jnp.bfloat16), ((tokens, top_k), jnp.int32), ((tokens, top_k), jnp.float32)]
    for shape in codes:
        shapes += [(shape, jnp.uint8), ((*shape[:-1], shape[-1] // 16), jnp.uint8)]
    op = functools.partial(triton.mxfp4_expert_mlp, routed=384, compute_capability=compute_capability)
    program = jax.jit(op).lower(
        *(jax.ShapeDtypeStruct(shape, dtype, sharding=device) for shape, dtype in [*shapes, ((), jnp.int32)])
    )
    compiled = program.compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # rows before, between and after the matmuls, of which every expert's may have seven fillings, and a tile more
    rows = tokens * top_k + 7 * min(experts, tokens * top_k) + 64
    assert memory.temp_size_in_bytes < 2 * rows * (2 * hidden + inner) + 4 * tokens * hidden + 1e6
    text = compiled.as_text() or ""
    calls = re.findall(r"= bf16\S* custom-call\((.*?)\), custom_call_target=\"triton_kernel_call\"", text)
    assert len(calls) == 2
    for operands, stack in zip(calls, ("gate_up", "down"), strict=True):
        assert f"%{stack}_codes" in operands
        assert f"%{stack}_scales" in operands
