"""MXFP4 interleaved for Hopper: the codec bit for bit, the rows, and experts on every backend that runs here."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interleaved_mxfp4, mxfp4
from pallas_kernels.interleaved_expert_mlp import interleaved_expert_mlp, mosaic_gpu
from pallas_kernels.interleaved_expert_mlp.mosaic_gpu import Tiling
from pallas_kernels.ragged_rows import ragged_rows
from tests.test_expert_mlp import expected, packed, routing

RUN = {
    "reference": jax.jit(functools.partial(interleaved_expert_mlp, backend="reference")),
    "auto": jax.jit(interleaved_expert_mlp),
}


@pytest.mark.parametrize("shape", [(128,), (3, 256), (2, 1, 5, 384)])
def test_deinterleaving_undoes_interleaving(shape, rng):
    codes = rng.integers(0, 256, (*shape[:-1], 7, shape[-1] // 2), dtype=np.uint8)
    scales = rng.integers(0, 161, (*shape[:-1], 7, shape[-1] // 32), dtype=np.uint8)
    words, blocks = interleaved_mxfp4.interleave(codes, scales)
    assert words.nbytes == codes.nbytes
    assert blocks.nbytes == scales.nbytes
    back = interleaved_mxfp4.deinterleave(words, blocks)
    np.testing.assert_array_equal(back[0], codes)
    np.testing.assert_array_equal(back[1], scales)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decodes_to_the_same_weights(dtype, rng):
    codes, scales, _ = packed((3, 2, 9, 256), rng)
    got = interleaved_mxfp4.decode(*interleaved_mxfp4.interleave(codes, scales), dtype)
    np.testing.assert_array_equal(got, mxfp4.decode(codes, scales, dtype))


def test_refuses_inputs_that_do_not_fill_words(rng):
    codes, scales, _ = packed((4, 96), rng)
    with pytest.raises(ValueError, match="a multiple, not 96"):
        interleaved_mxfp4.interleave(codes, scales)


def test_instructions_give_the_values_of_every_word(rng):
    """The kernel's shifts and masks on pairs of words, in NumPy: every word, beside a random one on either side."""
    nibbles = (np.arange(1 << 16)[:, None] >> np.array([0, 4, 8, 12])) & 15  # codes of inputs c, 32 + c, 64 + c, 96 + c
    values = np.array([*mxfp4.MAGNITUDES, *(-m for m in mxfp4.MAGNITUDES)])[nibbles]  # [words, 4]
    by_input = nibbles.reshape(-1, 32, 4).swapaxes(1, 2).reshape(-1, 128).astype(np.uint8)
    codes = by_input[:, ::2] | by_input[:, 1::2] << 4
    words, _ = interleaved_mxfp4.interleave(jnp.asarray(codes), jnp.full((len(codes), 4), 127, jnp.uint8))
    words = np.asarray(words).view(np.uint16).reshape(-1).astype(np.uint32)
    other = rng.permutation(len(words))
    pairs = words | words[other] << 16
    for slot, fields in enumerate(interleaved_mxfp4.FIELDS):
        parts = [(pairs << by if by >= 0 else pairs >> -by) & np.uint32(mask << 16 | mask) for by, mask in fields]
        bits = functools.reduce(operator.or_, parts)
        low, high = ((half << 16).astype(np.uint32).view(np.float32) for half in (bits & 0xFFFF, bits >> 16))
        np.testing.assert_array_equal(low.astype(np.float64) * 2.0**126, values[:, slot])
        np.testing.assert_array_equal(high.astype(np.float64) * 2.0**126, values[other, slot])


@pytest.mark.parametrize("scale", [33, 95, 127, 128, 159])
def test_products_with_scales_are_exact_bfloat16(scale):
    """bfloat16 of code and scale, multiplied, is 2**-31 of the weight, exactly."""
    _, blocks = interleaved_mxfp4.interleave(jnp.zeros((1, 64), jnp.uint8), jnp.full((1, 4), scale, jnp.uint8))
    power = (np.asarray(blocks).astype(np.uint32) << 23).view(np.float32)
    product = mxfp4.MAGNITUDES.astype(np.float64) * 2.0**-126 * power.reshape(-1, 1).astype(np.float64)
    rounded = product.astype(np.float32)
    assert not (rounded.view(np.uint32) & 0xFFFF).any()
    np.testing.assert_array_equal(
        rounded.astype(np.float64) * interleaved_mxfp4.PRODUCT_SCALE,
        np.broadcast_to(mxfp4.MAGNITUDES * 2.0 ** (scale - 127), rounded.shape),
    )


@pytest.mark.parametrize("tile", [8, 16, 64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "kind"),
    [(1, 1, 1, "random"), (8, 3, 9, "one takes all"), (40, 5, 16, "uneven"), (33, 4, 6, "last only")],
)
def test_ragged_rows(tokens, top_k, experts, kind, tile, rng):
    ids = routing(kind, tokens, top_k, experts, rng)
    ids[rng.uniform(size=ids.shape) < 0.2] = experts + rng.integers(3)  # elsewhere
    rows = jax.tree.map(np.asarray, jax.jit(ragged_rows, static_argnums=(1, 2))(ids, experts, tile))
    total, count = len(rows.token), int(rows.count[0])
    here = ids < experts
    assert (rows.row[~here] == total).all()
    assert len(np.unique(rows.row[here])) == here.sum()
    np.testing.assert_array_equal(rows.token[rows.row[here]], np.nonzero(here)[0])
    assert (rows.token < tokens).sum() == here.sum()
    expert_of_row = np.full(total, -1)
    for expert, first, size in zip(
        rows.tile_expert[:count], rows.tile_first[:count], rows.tile_rows[:count], strict=True
    ):
        assert 0 < size <= tile
        assert first % 8 == size % 8 == 0
        assert first + tile <= total
        assert (expert_of_row[first : first + size] == -1).all()
        expert_of_row[first : first + size] = expert
    np.testing.assert_array_equal(expert_of_row[rows.row[here]], ids[here])
    x = rng.normal(size=(tokens, 5)).astype(np.float32)
    weights = rng.uniform(size=ids.shape).astype(np.float32)
    got = rows.combine(jnp.asarray(rows.gather(jnp.asarray(x))), jnp.asarray(weights))
    np.testing.assert_allclose(got, x * (weights * here).sum(axis=1, keepdims=True), rtol=1e-5)


def interleaved(layers, experts, hidden, inner, rng):
    """Interleaved weights as the op takes them, and their values."""
    gate_up_codes, gate_up_scales, gate_up = packed((layers, experts, 2, inner, hidden), rng)
    down_codes, down_scales, down = packed((layers, experts, hidden, inner), rng)
    given = (
        *interleaved_mxfp4.interleave(gate_up_codes, gate_up_scales),
        *interleaved_mxfp4.interleave(down_codes, down_scales),
    )
    return given, gate_up, down


@pytest.mark.parametrize("backend", RUN)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "kind"), [(1, 1, 3, "random"), (8, 8, 9, "random"), (70, 2, 3, "one takes all")]
)
def test_on_a_cpu(tokens, top_k, experts, kind, backend, rng):
    given, gate_up, down = interleaved(2, experts, 256, 128, rng)
    x = (rng.normal(size=(tokens, 256)) / 4).astype(np.float32)
    ids = routing(kind, tokens, top_k, experts, rng)
    weights = rng.uniform(0.1, 1, size=ids.shape).astype(np.float32)
    out = RUN[backend](x, ids, weights, *given, layer=jnp.int32(1))
    reference = expected(x, ids, weights, gate_up[1], down[1])
    np.testing.assert_allclose(out, reference, rtol=2e-5, atol=2e-5 * np.abs(reference).max())


SMALL, WIDE, TALL = Tiling(8, 1, 1, 2), Tiling(8, 2, 2, 2), Tiling(16, 1, 1, 3)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "inner", "kind", "tilings"),
    [
        (5, 2, 3, 256, 128, "random", (SMALL, SMALL)),
        pytest.param(3, 1, 2, 256, 256, "random", (WIDE, WIDE), marks=pytest.mark.slow),
        pytest.param(21, 2, 3, 256, 128, "one takes all", (TALL, TALL), marks=pytest.mark.slow),
        pytest.param(40, 1, 2, 256, 128, "last only", (TALL, TALL), marks=pytest.mark.slow),
        pytest.param(6, 2, 4, 256, 256, "uneven", (TALL, TALL._replace(blocks=2)), marks=pytest.mark.slow),
    ],
)
def test_interpreted(tokens, top_k, experts, hidden, inner, kind, tilings, rng):
    """The kernel but for its decoding and its kind of product (see `mosaic_gpu`), and no race found in it."""
    given, gate_up, down = interleaved(2, experts, hidden, inner, rng)
    x = jnp.asarray(rng.normal(size=(tokens, hidden)) / 4, jnp.bfloat16)
    ids = routing(kind, tokens, top_k, experts, rng)
    ids[0, 0] = experts  # elsewhere
    weights = rng.uniform(0.1, 1, size=ids.shape).astype(np.float32)
    out = mosaic_gpu.interleaved_expert_mlp(
        x,
        jnp.asarray(ids),
        jnp.asarray(weights),
        *given,
        jnp.int32(1),
        routed=None,
        tilings=tilings,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    weights[0, 0], ids[0, 0] = 0, 0
    reference = expected(np.asarray(x.astype(jnp.float32)), ids, weights, gate_up[1], down[1])
    assert np.linalg.norm(out - reference) <= 4e-3 * np.linalg.norm(reference)
    assert gpu_callbacks.get_races().races_found is False


@pytest.mark.parametrize(
    ("dtype", "hidden", "inner", "message"),
    [
        (jnp.float32, 256, 128, "must be bfloat16, not float32"),
        (jnp.bfloat16, 128, 128, "hidden 128 must be a multiple of 256"),
    ],
)
def test_refuses(dtype, hidden, inner, message, rng):
    given, _, _ = interleaved(1, 2, hidden, inner, rng)
    x, ids, weights = jnp.zeros((3, hidden), dtype), jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1))
    with pytest.raises(NotImplementedError, match=message):
        interleaved_expert_mlp(x, ids, weights, *given, layer=0, backend="mosaic_gpu")


@pytest.mark.parametrize("experts", [24, 384])
@pytest.mark.parametrize("tokens", [1, 8, 64, 300, 2048, 8192])
@pytest.mark.parametrize(
    ("hidden", "inner"), [(6144, 2048), (6144, 256), (6144, 128), (4096, 2048), (4096, 1024), (256, 128)]
)
def test_chosen_tilings_fit(tokens, experts, hidden, inner):
    for tiling, outputs, inputs in zip(
        mosaic_gpu.choose_tilings(tokens * 8, experts, 384, hidden, inner),
        (inner, hidden // 2),
        (hidden, inner),
        strict=True,
    ):
        assert outputs % (64 * tiling.warpgroups) == 0
        assert inputs % (128 * tiling.blocks) == 0
        assert tiling.stages >= 2
