"""Experts held as the Hopper kernel reads them give what packed ones give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.abstract import abstract_model
from mimo_jax.evaluation.score import score
from mimo_jax.model import LoadOptions, load_model
from mimo_jax.presets import NANO
from mimo_jax.quantization import InterleavedWeight, MXFP4Weight, dequantize
from sharding.topology import Topology

ONE, WHOLE_EXPERTS = Topology(), Topology(2, expert_parallel=2)


def experts(model):
    return [
        model.params.backbone["layers"][kind]["mlp"][name]
        for kind in ("swa_moe", "full_moe")
        for name in ("gate_up", "down")
    ]


@pytest.mark.parametrize("topology", [ONE, WHOLE_EXPERTS])
def test_weights_are_the_same_and_lie_where_they_should(topology):
    packed, held = (load_model(NANO, LoadOptions(storage=s, topology=topology)) for s in ("packed", "interleaved"))
    expected = abstract_model(held.config, held.drafter_config, "float32", topology, held.mesh)
    for ours, theirs, shape in zip(experts(held), experts(packed), experts(expected), strict=True):
        assert isinstance(ours, InterleavedWeight)
        assert isinstance(theirs, MXFP4Weight)
        np.testing.assert_array_equal(dequantize(ours, jnp.float32), dequantize(theirs, jnp.float32))
        for array, outlined in zip(jax.tree.leaves(ours), jax.tree.leaves(shape), strict=True):
            assert (array.shape, array.dtype, array.sharding) == (outlined.shape, outlined.dtype, outlined.sharding)


def test_logits_are_the_same(rng):
    ids = rng.integers(0, 2048, (2, 40))
    models = [load_model(NANO, LoadOptions(storage=s)) for s in ("packed", "interleaved")]
    one, other = (score(model, ids)["logits"] for model in models)
    np.testing.assert_array_equal(one, other)


def test_refuses_parts_of_experts_that_are_too_narrow():
    with pytest.raises(ValueError, match="of an expert's 128 columns in 128s, not 256 and 1/2: choose packed"):
        load_model(NANO, LoadOptions(storage="interleaved", topology=Topology(2)))
