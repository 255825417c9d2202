"""The ablation: rounds are those of decoding, arms cost the same, and intervals hold what they should."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.params import Declared
from mimo_jax.request import SamplingParams
from mimo_jax.speculative import Models
from mimo_jax.training import ablation
from mimo_jax.training.ablation import ArmTrainer, Budget, rounds_of
from mimo_jax.training.ablation_results import effects, read_results
from mimo_jax.training.answers import Answers
from mimo_jax.training.arms import ARMS, BASE
from tests.models import Oracle, counting_model, decoded, tiny_configs


class Fallible(Oracle):
    """As many drafts are right as the anchor modulo 6."""

    def __call__(self, anchor, ring, lengths):
        right = jnp.argmax(anchor, axis=-1)[:, None] % 6
        good = super().__call__(anchor, ring, lengths)
        return jnp.where((jnp.arange(good.shape[1]) <= right)[..., None], good, jnp.roll(good, 1, axis=-1))


@pytest.mark.slow
def test_rounds_are_those_of_decoding(monkeypatch, rng):
    """Without decoding: from which drafts of the given answers would stand."""
    monkeypatch.setattr(ablation, "Drafter", Fallible)
    models, params = counting_model(61, 0)
    config = replace(tiny_configs()[1], hidden_size=61)
    models = Models(models.backbone, Declared(lambda: Fallible(config, "float32")))
    prompts = [rng.integers(0, 61, n).tolist() for n in (1, 4, 9, 2)]
    wanted = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (30, 1, 17, 26)]
    trainer = ArmTrainer(ARMS[BASE], models.backbone, config, Budget(1, 2, 40, 8, 1e-3))
    tokens, lengths = decoded(models, params, prompts, wanted, verify_length=5)
    assert params.drafter is not None
    stood = trainer.stood(params.backbone, params.drafter, Answers(list(zip(prompts, tokens, strict=True))))
    assert [rounds_of(s, 5) for s in stood] == [len(accepted) for accepted in lengths]
    assert [len(s) for s in stood] == [len(answer) for answer in tokens]
    assert len({n for accepted in lengths for n in accepted}) >= 3


def test_arms_differ_from_the_base_in_one_choice():
    """And draft as many rows a step."""
    config = replace(tiny_configs()[1], target_layer_ids=(0, 2, 4, 6, 7), num_target_layers=8)
    base = vars(ARMS[BASE])
    assert all(sum(vars(arm)[k] != base[k] for k in base) == 1 for name, arm in ARMS.items() if name != BASE)
    assert ARMS["layers-3"].config(config).target_layer_ids == (0, 4, 7)
    assert ARMS["layers-1"].config(config).target_layer_ids == (7,)
    assert ARMS[BASE].config(config) == config
    backbone = counting_model(61, 0)[0].backbone
    trainers = [ArmTrainer(ARMS[name], backbone, config, Budget(9, 2, 40, 64, 1e-3)) for name in (BASE, "block-16")]
    assert [t._trainer.anchors * t.config.block_size for t in trainers] == [512, 512]


def results(rng, gain: float, seeds: int, answers: int):
    """Made-up results: answers of very different kinds, seeds that go well or badly, and an arm that is better."""
    rounds = rng.integers(5, 40, answers)
    kind = rng.uniform(2.0, 6.0, answers)
    made = []
    for seed in range(seeds):
        luck = rng.normal(0, 0.1, 2)
        for arm, more in ((BASE, 0.0), ("kd", gain)):
            length = kind + more + luck[int(arm == "kd")] + rng.normal(0, 0.3, answers)
            measured = {"x": {"tokens": (rounds * length).tolist(), "rounds": {"8": rounds.tolist()}}}
            made.append({"arm": arm, "seed": seed, "measured": measured})
    return made


def test_intervals_hold_the_true_change(rng):
    """In 95 of 100 experiments, seeds and answers drawn anew."""
    held = 0
    for _ in range(100):
        base, arm = effects(results(rng, 0.2, 3, 40), BASE)
        assert (base.arm, arm.arm, base.change, base.low) == (BASE, "kd", 0.0, None)
        assert arm.low is not None
        assert arm.high is not None
        held += arm.low <= 0.2 <= arm.high
    assert held >= 88  # at 95 %, once in 700 below
    _, certain = effects(results(rng, 2.0, 5, 40), BASE)
    assert certain.low is not None
    assert certain.low > 1.0
    assert certain.accepted_length == pytest.approx(np.mean(certain.by_seed))


def test_effects_use_the_seeds_that_both_have(rng, tmp_path):
    made = results(rng, 0.2, 3, 10)
    whole = list(effects(made, BASE))
    assert list(effects(made[:-1], BASE))[1].by_seed == whole[1].by_seed[:2]
    _, alone = effects(made[:2], BASE)
    assert (alone.low, alone.high) == (None, None)
    assert not list(effects([r for r in made if r["arm"] != BASE], BASE))
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    path.write_text('{"arm": "kd"}\n{"arm": "ba')
    assert read_results(path) == [{"arm": "kd"}]
