"""Both attention ops by every backend that runs here, in bfloat16, against float64 NumPy.

The Hopper kernels run in Pallas' interpreter, which also looks for races between their warpgroups and copies.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import mosaic_gpu as paged_mosaic_gpu
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention import reference as paged_reference
from pallas_kernels.window_attention import mosaic_gpu as window_mosaic_gpu
from pallas_kernels.window_attention import reference as window_reference
from pallas_kernels.window_attention import window_attention
from tests import test_paged_attention as paged
from tests import test_window_attention as window

# weights and the result are rounded to bfloat16 (2**-9 relative each); values reach about 3
close = partial(np.testing.assert_allclose, rtol=1e-2, atol=1.5e-2)
BACKENDS = ["reference", "mosaic_gpu"]


@dataclass(frozen=True)
class Ring(window.Case):
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pages(paged.Case):
    lengths: tuple[int, ...] = ()
    splits: int | None = None


def interpreted(op):
    """The op's kernel on a CPU."""

    def run(*arrays, **static):
        out = op(*arrays, **static, interpret=plgpu.InterpretGPUParams(detect_races=True))
        out.block_until_ready()
        assert not gpu_callbacks.get_races().races_found
        return out

    return run


RINGS = [
    # nothing committed, and a ring that has wrapped
    Ring(4, 2, 32, 16, slots=16, rows=8, visible_keys=9, causal=True, sink=True, lengths=(0, 21)),
    # the release's window at its edge; the last slots share a tile with the block's rows
    Ring(2, 1, 64, 32, slots=136, rows=8, visible_keys=129, causal=True, sink=True, lengths=(1, 128, 135, 1_000_003)),
    Ring(2, 1, 32, 32, slots=24, rows=1, visible_keys=17, causal=True, sink=False, lengths=(15, 17)),
    # more tiles than stages, and rows that are no multiple of 8
    Ring(2, 1, 32, 16, slots=328, rows=5, visible_keys=320, causal=False, sink=True, lengths=(3, 1000)),
    # two warpgroups, and heads as the release has them
    Ring(16, 1, 192, 128, slots=64, rows=8, visible_keys=57, causal=True, sink=True, lengths=(70,)),
    # several tiles of rows, whose windows leave the ring behind
    pytest.param(
        Ring(2, 1, 32, 16, slots=24, rows=150, visible_keys=17, causal=True, sink=True, lengths=(3, 30)),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        Ring(2, 1, 32, 16, slots=24, rows=70, visible_keys=None, causal=False, sink=False, lengths=(0, 24)),
        marks=pytest.mark.slow,
    ),
]

case_of_pages = partial(Pages, keys_per_step=64)
PAGES = [
    case_of_pages(4, 2, 32, 16, rows=8, page_size=16, columns=7, sink=True, lengths=(0, 100), splits=2),
    # page edges; more programs than tiles
    case_of_pages(2, 1, 32, 16, rows=1, page_size=64, columns=3, sink=False, lengths=(1, 63, 64, 192), splits=5),
    case_of_pages(2, 1, 64, 32, rows=8, page_size=128, columns=2, sink=True, lengths=(0, 129), splits=1),
    # more tiles than stages; two warpgroups
    case_of_pages(16, 1, 192, 128, rows=8, page_size=64, columns=5, sink=True, lengths=(0, 320)),
    # several tiles of rows
    pytest.param(
        case_of_pages(4, 2, 32, 16, rows=75, page_size=16, columns=5, sink=True, lengths=(17, 65)),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", RINGS, ids=str)
def test_window_attention(case, backend, rng):
    data = window.make(case, rng, jnp.bfloat16, case.lengths)
    op = {
        "reference": window_reference.window_attention,
        "mosaic_gpu": interpreted(window_mosaic_gpu.window_attention),
    }[backend]
    out = op(
        *(jnp.asarray(getattr(data, name), jnp.bfloat16) for name in ("q", "ring_k", "ring_v", "block_k", "block_v")),
        jnp.int32(window.LAYER),
        jnp.asarray(data.lengths),
        None if data.sink is None else jnp.asarray(data.sink),
        visible_keys=case.visible_keys,
        causal=case.causal,
    )
    close(np.asarray(out, np.float32), window.expected(case, data))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PAGES, ids=str)
def test_paged_attention(case, backend, rng):
    data = paged.make(case, rng, jnp.bfloat16, case.lengths)
    op = {
        "reference": paged_reference.paged_attention,
        "mosaic_gpu": interpreted(partial(paged_mosaic_gpu.paged_attention, splits=case.splits)),
    }[backend]
    out = op(
        *(jnp.asarray(getattr(data, name), jnp.bfloat16) for name in ("q", "k_pages", "v_pages", "block_k", "block_v")),
        jnp.int32(paged.LAYER),
        jnp.asarray(data.table),
        jnp.asarray(data.lengths),
        None if data.sink is None else jnp.asarray(data.sink),
    )
    close(np.asarray(out, np.float32), paged.expected(case, data))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"dtype": jnp.float32}, "bfloat16"),
        ({"qk_dim": 40}, "multiple of 16"),
        ({"v_dim": 264}, "up to 256"),
        ({"slots": 20}, "multiple of 8 slots"),
    ],
)
def test_what_the_window_kernel_does_not_support_is_refused_and_left_to_the_reference(changes, refusal):
    size = {"qk_dim": 32, "v_dim": 32, "slots": 24, "dtype": jnp.bfloat16} | changes
    arrays = [
        jnp.ones(shape, size["dtype"])
        for shape in (
            (1, 2, 2, size["qk_dim"]),
            *((1, 1, size["slots"], 1, size[dim]) for dim in ("qk_dim", "v_dim")),
            *((1, 2, 1, size[dim]) for dim in ("qk_dim", "v_dim")),
        )
    ]
    settings = {"layer": 0, "lengths": jnp.zeros(1, jnp.int32), "visible_keys": 9, "causal": True, "sink": None}
    with pytest.raises(NotImplementedError, match=refusal):
        window_attention(*arrays, **settings, backend="mosaic_gpu")
    np.testing.assert_array_equal(window_attention(*arrays, **settings), jnp.ones((1, 2, 2, size["v_dim"])))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"dtype": jnp.float32}, "bfloat16"),
        ({"qk_dim": 40}, "multiple of 16"),
        ({"page_size": 24}, "pages must hold"),
        ({"page_size": 96}, "pages must hold"),
        ({"columns": 0}, "there must be pages"),
    ],
)
def test_what_the_paged_kernel_does_not_support_is_refused_and_left_to_the_reference(changes, refusal):
    size = {"qk_dim": 32, "v_dim": 32, "page_size": 16, "columns": 2, "dtype": jnp.bfloat16} | changes
    arrays = [
        jnp.ones(shape, size["dtype"])
        for shape in (
            (1, 2, 2, size["qk_dim"]),
            *((1, 3, size["page_size"], 1, size[dim]) for dim in ("qk_dim", "v_dim")),
            *((1, 2, 1, size[dim]) for dim in ("qk_dim", "v_dim")),
        )
    ]
    table = jnp.zeros((1, size["columns"]), jnp.int32)
    settings = {"layer": 0, "page_table": table, "lengths": jnp.zeros(1, jnp.int32), "sink": None}
    with pytest.raises(NotImplementedError, match=refusal):
        paged_attention(*arrays, **settings, backend="mosaic_gpu")
    np.testing.assert_array_equal(paged_attention(*arrays, **settings), jnp.ones((1, 2, 2, size["v_dim"])))
