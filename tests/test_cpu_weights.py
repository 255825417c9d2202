"""Weights held by layer, inputs first, give what stacks give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.cache import backbone_cache
from mimo_jax.cpu_weights import by_layer
from mimo_jax.model import LoadOptions, load_model
from mimo_jax.presets import NANO
from mimo_jax.quantization import ByLayer
from mimo_jax.request import SamplingParams
from mimo_jax.speculative import ModelParams
from sharding.topology import Topology
from tests.models import decoded, tiny_model


@pytest.fixture(scope="module")
def case():
    models, params = tiny_model(5)
    copies = jax.tree.map(jnp.copy, (params.backbone, params.drafter))
    assert models.drafter is not None
    held = ModelParams(by_layer(copies[0], models.backbone.axes), by_layer(copies[1], models.drafter.axes))
    return models, params, held


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_logits_are_the_same(case, rng, rows):
    models, params, held = case
    config = models.backbone.module.config
    tokens = rng.integers(0, config.vocab_size, (1, rows)).astype(np.int32)

    @jax.jit
    def logits(params):
        backbone = models.backbone.bind(params)
        output = backbone(tokens, backbone_cache(config, 1, 64, 8, "float32"), models.capture)
        return backbone.logits(output.hidden), output.captured, output.kv

    for got, expected in zip(*(jax.tree.leaves(logits(p.backbone)) for p in (held, params)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.slow
def test_tokens_are_the_same(case):
    models, params, held = case
    prompts = [[1, 2, 3], [7, 5, 4, 9, 30], [11]]
    settings = [SamplingParams(max_new_tokens=30, temperature=t, seed=3, ignore_eos=True) for t in (0, 1, 0)]
    assert decoded(models, held, prompts, settings, verify_length=8) == decoded(
        models, params, prompts, settings, verify_length=8
    )


def test_a_small_model_on_a_cpu_is_held_so():
    assert isinstance(load_model(NANO).params.backbone["layers"]["swa_moe"]["attention"]["q"], ByLayer)
    with pytest.raises(ValueError, match="one device"):
        load_model(NANO, LoadOptions(storage="by_layer", topology=Topology(2)))
