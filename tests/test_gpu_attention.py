"""The attention kernels, assembled for an H200 at the sizes of the releases: nothing spills and no key is copied."""

import math
import re

import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.window_attention import window_attention
from tests.gpu_programs import compile_for_h200

pytestmark = pytest.mark.gpu_compile

LAYERS = 3
BF16 = jnp.bfloat16


def check(program, keys):
    """One kernel of Mosaic's, without spills; committed keys are handed to it as they are.

    `keys` is the number of slots or of pages, by which these arrays are known: no other has a multiple of it.
    """
    (kernel,) = program.kernels
    print(kernel)
    assert kernel.spilled_bytes == 0
    assert "wgmma.mma_async" in program.report
    assert "serialized" not in program.report  # ptxas would make each product wait for the one before
    assert 'custom_call_target="mosaic_gpu_v2"' in program.hlo
    made = re.findall(r"%\S+ = bf16\[([0-9,]+)\]\S* ([a-z][\w-]*)\(", program.hlo)
    by = {kind for dims, kind in made if math.prod(map(int, dims.split(","))) % keys == 0}
    assert by == {"parameter", "bitcast"}


@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no sink"])
@pytest.mark.parametrize(
    ("batch", "rows", "heads", "kv_heads", "qk_dim", "slots", "visible_keys", "causal"),
    [
        pytest.param(16, 8, 16, 1, 192, 136, 129, True, id="SWA verify, an eighth of Pro"),
        pytest.param(3, 8, 128, 8, 192, 136, 129, True, id="SWA verify, all of Pro"),
        pytest.param(16, 1, 16, 1, 192, 136, 129, True, id="SWA decode, an eighth of Pro"),
        pytest.param(3, 8, 64, 8, 192, 136, 129, True, id="SWA verify, all of V2.5"),
        pytest.param(3, 2048, 16, 1, 192, 136, 129, True, id="SWA prefill, an eighth of Pro"),
        pytest.param(16, 8, 16, 1, 128, 1032, 1024, False, id="draft, an eighth of Pro's drafter"),
        pytest.param(3, 8, 64, 8, 128, 1032, 1024, False, id="draft, all of V2.5's drafter"),
    ],
)
def test_window_attention(batch, rows, heads, kv_heads, qk_dim, slots, visible_keys, causal, sink):
    def attend(q, ring_k, ring_v, block_k, block_v, layer, lengths, sink):
        return window_attention(
            q, ring_k, ring_v, block_k, block_v, layer=layer, lengths=lengths, visible_keys=visible_keys,
            causal=causal, sink=sink,
        )  # fmt: skip

    program = compile_for_h200(
        attend,
        ((batch, rows, heads, qk_dim), BF16),
        *(((LAYERS, batch, slots, kv_heads, dim), BF16) for dim in (qk_dim, 128)),
        *(((batch, rows, kv_heads, dim), BF16) for dim in (qk_dim, 128)),
        ((), jnp.int32),
        ((batch,), jnp.int32),
        ((heads,), jnp.float32) if sink else None,
    )
    check(program, slots)


@pytest.mark.parametrize(
    ("batch", "rows", "heads", "kv_heads", "page_size", "columns"),
    [
        pytest.param(1, 8, 16, 1, 64, 16384, id="verify at up to a million positions, an eighth of Pro"),
        pytest.param(8, 8, 16, 1, 64, 512, id="verify, an eighth of Pro"),
        pytest.param(8, 1, 16, 1, 64, 512, id="decode, an eighth of Pro"),
        pytest.param(8, 8, 16, 1, 16, 2048, id="verify, pages of 16"),
        pytest.param(8, 8, 16, 1, 128, 256, id="verify, pages of 128"),
        pytest.param(32, 8, 128, 8, 64, 64, id="verify, all of Pro, nothing to split"),
        pytest.param(2, 8, 64, 4, 64, 512, id="verify, all of V2.5"),
        pytest.param(1, 2048, 16, 1, 64, 512, id="prefill, an eighth of Pro"),
    ],
)
def test_paged_attention(batch, rows, heads, kv_heads, page_size, columns):
    def attend(q, k_pages, v_pages, block_k, block_v, layer, page_table, lengths):
        return paged_attention(
            q, k_pages, v_pages, block_k, block_v, layer=layer, page_table=page_table, lengths=lengths, sink=None
        )

    pages = batch * columns + 7
    program = compile_for_h200(
        attend,
        ((batch, rows, heads, 192), BF16),
        *(((LAYERS, pages, page_size, kv_heads, dim), BF16) for dim in (192, 128)),
        *(((batch, rows, kv_heads, dim), BF16) for dim in (192, 128)),
        ((), jnp.int32),
        ((batch, columns), jnp.int32),
        ((batch,), jnp.int32),
    )
    check(program, pages)
