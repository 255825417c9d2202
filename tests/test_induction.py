"""A backbone copies before its first step: the hand-set induction circuit against its absence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.backbone import Backbone
from mimo_jax.cache import backbone_cache
from mimo_jax.config import BackboneConfig
from mimo_jax.params import Declared, Params
from mimo_jax.presets import PRESETS
from mimo_jax.training.induction import with_induction
from mimo_jax.training.initialization import initial_params


def copying(backbone: Declared[Backbone], *models: Params) -> list[float]:
    """Of each set of parameters: how many standard deviations the right token's logit stands above the mean where
    random tokens are said again."""
    rng, n = np.random.default_rng(0), 40
    ids = jnp.asarray(np.tile(rng.integers(0, 500, (4, n)), 2), jnp.int32)

    @jax.jit
    def logits_of(params: Params) -> jax.Array:
        bound = backbone.bind(params)
        hidden = bound(ids[:, :-1], backbone_cache(bound.config, len(ids), 0, 1, "float32")).hidden
        return bound.logits(hidden[:, n:])

    def above(logits: np.ndarray) -> float:
        right = np.take_along_axis(logits, np.asarray(ids)[:, n + 1 :, None], axis=-1)[..., 0]
        return float(np.mean((right - logits.mean(-1)) / logits.std(-1)))

    return [above(np.asarray(logits_of(params))) for params in models]


@pytest.mark.parametrize("preset", ["nano", "tiny"])
def test_repeated_tokens_are_expected_before_training(preset: str):
    config = BackboneConfig.from_hf(PRESETS[preset].backbone)
    backbone = Declared(lambda: Backbone(config, "float32"))
    plain = initial_params(backbone, len(config.layers), seed=3)
    random, circuit = copying(backbone, plain, with_induction(plain, config, seed=4))
    assert abs(random) < 0.5, "random weights expect nothing"
    assert circuit > 1.0


def test_only_the_circuit_is_set():
    config = BackboneConfig.from_hf(PRESETS["tiny"].backbone)
    plain = initial_params(Declared(lambda: Backbone(config, "float32")), len(config.layers), seed=3)
    circuit = with_induction(plain, config, seed=4)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), plain, circuit)
    changed = {
        jax.tree_util.keystr(path)
        for (path, a), b in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(circuit), strict=True)
        if not np.array_equal(a, b)
    }
    attention = {f"['layers']['{kind}']['attention']['{name}']" for kind in ("swa_moe", "full_moe") for name in "qkvo"}
    assert changed == attention | {"['embedding']", "['lm_head']"}


def test_layers_that_cannot_hold_it_are_left_alone():
    config = BackboneConfig.from_hf(PRESETS["tiny"].backbone | {"hybrid_layer_pattern": [0, 0, 0, 0, 0, 0, 1]})
    plain = initial_params(Declared(lambda: Backbone(config, "float32")), len(config.layers), seed=3)
    assert with_induction(plain, config, seed=4) is plain
