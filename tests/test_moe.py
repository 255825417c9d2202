"""Routing on the golden cases and against float64 NumPy; the MoE layer with every kind of weight."""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mimo_jax.config import MoeConfig
from mimo_jax.moe import MoE, route
from mimo_jax.params import Declared
from mimo_jax.quantization import FP8BlockWeight, MXFP4Weight
from sharding.topology import Topology
from tests.conftest import golden_folders, golden_id

run_route = jax.jit(route, static_argnames="config")


def config_of(experts, top_k, groups=1, top_groups=1, normalize=True, scaling=1.0, intermediate=32):
    return MoeConfig(experts, top_k, intermediate, groups, top_groups, normalize, scaling)


def golden_cases():
    return [
        pytest.param(folder, case, id=f"{golden_id(folder)}-{case['name']}")
        for folder in golden_folders("router_cases")
        for case in json.loads((folder / "cases.json").read_text())
    ]


@pytest.mark.parametrize(("folder", "case"), golden_cases())
def test_golden(folder, case):
    golden = load_file(folder / "golden.safetensors")
    logits, bias, dense, sorted_ids, sorted_weights = (
        golden[f"{case['name']}.{part}"] for part in ("logits", "bias", "dense_weights", "expert_ids", "expert_weights")
    )
    config = config_of(
        case["n_routed_experts"],
        case["num_experts_per_tok"],
        case["n_group"],
        case["topk_group"],
        case["norm_topk_prob"],
        1.0 if case["routed_scaling_factor"] is None else case["routed_scaling_factor"],
    )
    assert logits.shape == (case["tokens"], config.experts)
    ids, weights = (np.asarray(a) for a in run_route(logits, bias, config=config))
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    order = np.argsort(ids, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(ids, order, 1), sorted_ids)
    np.testing.assert_allclose(np.take_along_axis(weights, order, 1), sorted_weights, rtol=2e-6, atol=0)
    scattered = np.zeros_like(dense)
    np.put_along_axis(scattered, ids, weights, axis=1)
    np.testing.assert_allclose(scattered, dense, rtol=2e-6, atol=0)


@pytest.mark.parametrize("folder", golden_folders("router_cases"), ids=golden_id)
def test_golden_single_expert_keeps_its_score(folder):
    """With one expert a token the references differ; normalising it to 1 is not what the model's own code does."""
    golden = load_file(folder / "golden.safetensors")
    logits = golden["probe_top1.logits"]
    ids, weights = run_route(logits, np.zeros(logits.shape[1], np.float32), config=config_of(logits.shape[1], 1))
    np.testing.assert_array_equal(ids, golden["probe_top1.expert_ids"])
    np.testing.assert_allclose(weights, golden["probe_top1.remote_weights"], rtol=2e-6, atol=0)


@pytest.mark.parametrize("folder", golden_folders("router_cases"), ids=golden_id)
def test_golden_ties(folder):
    golden = load_file(folder / "golden.safetensors")
    logits, expected = golden["ties.logits"], golden["ties.expert_weights_sorted"]
    config = config_of(logits.shape[1], expected.shape[1])
    ids, weights = run_route(logits, np.zeros(logits.shape[1], np.float32), config=config)
    np.testing.assert_allclose(np.sort(weights, axis=1), np.sort(expected, axis=1), rtol=2e-6, atol=0)
    assert all(len(set(row)) == len(row) for row in np.asarray(ids).tolist())


def test_equal_scores_go_to_the_lower_id():
    ids, weights = run_route(np.zeros((2, 9), np.float32), np.zeros(9, np.float32), config=config_of(9, 4))
    np.testing.assert_array_equal(ids, np.tile(np.arange(4), (2, 1)))
    np.testing.assert_array_equal(weights, np.full((2, 4), 0.25))


def expected_route(logits, bias, config):
    """Dense weights [tokens, experts] in float64, groups and all."""
    scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    out = np.zeros_like(scores)
    size = config.experts // config.groups
    for token, score in enumerate(scores):
        choice = score + bias
        if config.groups > 1:
            ranks = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(config.groups)]
            for g in np.argsort(ranks)[: config.groups - config.top_groups]:
                choice[g * size : (g + 1) * size] = -np.inf
        chosen = np.argsort(-choice, kind="stable")[: config.top_k]
        weights = score[chosen]
        if config.normalize and config.top_k > 1:
            weights = weights / (weights.sum() + 1e-20)
        out[token, chosen] = weights * config.scaling
    return out


@pytest.mark.parametrize(
    "config",
    [
        config_of(7, 3),
        config_of(5, 5),
        config_of(4, 1),
        config_of(4, 1, normalize=False, scaling=3.0),
        config_of(20, 4, groups=5, top_groups=2, scaling=1.5),
        config_of(8, 2, groups=4, top_groups=1),
        config_of(8, 8, groups=4, top_groups=4, normalize=False),
    ],
    ids=str,
)
def test_random(config, rng):
    # far from ties: all scores differ by more than float32 could confuse
    scores = rng.permuted(np.tile(np.linspace(0.05, 0.95, config.experts), (50, 1)), axis=1)
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    bias = (rng.normal(size=config.experts) - 2).astype(np.float32)  # all choices negative: masking with 0 would show
    ids, weights = run_route(logits, bias, config=config)
    dense = np.zeros_like(logits)
    np.put_along_axis(dense, np.asarray(ids), np.asarray(weights), axis=1)
    np.testing.assert_allclose(dense, expected_route(logits, bias, config), rtol=2e-6, atol=0)


@dataclass
class Layer:
    params: dict
    router: np.ndarray
    bias: np.ndarray
    gate_up: np.ndarray
    """[layers, experts, 2, inner, hidden] float64, what the stored weights stand for."""
    down: np.ndarray


LAYERS, HIDDEN = 2, 64
CONFIG = config_of(6, 2, intermediate=32)


def make_layer(kind, rng):
    def values(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    def stored(*shape):
        if kind == "float32":
            plain = values(*shape)
            return plain, plain.astype(np.float64)
        if kind == "fp8":
            codes = (values(*shape) * 8).astype(ml_dtypes.float8_e4m3fn)
            scales = rng.uniform(0.1, 0.2, size=(*shape[:-2], shape[-2] // 16, 1)).astype(np.float32)
            weight = FP8BlockWeight(jnp.asarray(codes), jnp.asarray(scales))
            return weight, codes.astype(np.float64) * np.repeat(scales.astype(np.float64), 16, axis=-2)
        assert kind == "mxfp4"
        codes = rng.integers(0, 256, size=(*shape[:-1], shape[-1] // 2), dtype=np.uint8)
        scales = rng.integers(122, 125, size=(*shape[:-1], shape[-1] // 32), dtype=np.uint8)
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(shape)
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        plain = np.concatenate([magnitudes, -magnitudes])[nibbles]
        plain = plain * np.repeat(2.0 ** (scales.astype(np.int64) - 127), 32, axis=-1)
        return MXFP4Weight(jnp.asarray(codes), jnp.asarray(scales)), plain

    router, bias = values(LAYERS, CONFIG.experts, HIDDEN) * 4, values(LAYERS, CONFIG.experts)
    gate_up, plain_gate_up = stored(LAYERS, CONFIG.experts, 2, CONFIG.intermediate, HIDDEN)
    down, plain_down = stored(LAYERS, CONFIG.experts, HIDDEN, CONFIG.intermediate)
    params = {"router": router, "correction_bias": bias, "gate_up": gate_up, "down": down}
    return Layer(jax.tree.map(jnp.asarray, params), router, bias, plain_gate_up, plain_down)


def call_layer(router_dtype):
    declared = Declared(lambda: MoE(CONFIG, HIDDEN, router_dtype, LAYERS, jnp.float32, Topology()))
    return jax.jit(lambda params, x, layer: declared.bind(params)(x, layer))


@pytest.mark.parametrize("kind", ["float32", "fp8", "mxfp4"])
@pytest.mark.parametrize("router_dtype", ["float32", "bfloat16"])
def test_layer(kind, router_dtype, rng):
    layer = make_layer(kind, rng)
    call = call_layer(router_dtype)
    x = rng.normal(size=(11, HIDDEN)).astype(np.float32)
    for i in range(LAYERS):
        inputs, router = x, layer.router[i]
        if router_dtype == "bfloat16":
            inputs, router = inputs.astype(ml_dtypes.bfloat16), router.astype(ml_dtypes.bfloat16)
        logits = inputs.astype(np.float64) @ router.astype(np.float64).T
        dense = expected_route(logits, layer.bias[i], CONFIG)
        expected = np.zeros(x.shape)
        for token, row in enumerate(x.astype(np.float64)):
            for e in np.flatnonzero(dense[token]):
                gate, up = layer.gate_up[i, e] @ row
                expected[token] += dense[token, e] * (layer.down[i, e] @ (gate / (1 + np.exp(-gate)) * up))
        out = np.asarray(call(layer.params, x, jnp.int32(i)))
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_router_precision_shows(rng):
    """The two settings give different weights, so the test above can tell them apart."""
    layer = make_layer("float32", rng)
    x = rng.normal(size=(11, HIDDEN)).astype(np.float32)
    outs = [
        np.asarray(call_layer(router_dtype)(layer.params, x, jnp.int32(0))) for router_dtype in ("float32", "bfloat16")
    ]
    assert np.abs(outs[0] - outs[1]).max() > 1e-4 * np.abs(outs[0]).max()
