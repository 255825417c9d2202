"""The trained model in the package: that it is what its card says, and decodes as it was recorded to."""

import json

import numpy as np
import pytest

from mimo_jax import Generator
from mimo_jax.config import BackboneConfig
from mimo_jax.evaluation.acceptance import measure
from mimo_jax.evaluation.prompts import load
from mimo_jax.evaluation.scenarios import SCENARIOS, prompts
from mimo_jax.presets import NANO, PRESETS
from mimo_jax.quantization import MXFP4Weight
from mimo_jax.request import SamplingParams
from mimo_jax.session import Decoding
from sharding.topology import Topology


@pytest.fixture(scope="module")
def generator():
    return Generator.load(progress=False)


def recorded(name):
    return json.loads((NANO / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_it_is_small_and_in_the_release_layout():
    assert sum(path.stat().st_size for path in NANO.rglob("*") if path.is_file()) <= 16e6
    config = BackboneConfig.from_folder(NANO)
    assert config == PRESETS["nano"].configs()[0]
    assert config.max_positions >= 4096
    assert config.quantization is not None
    assert config.quantization.expert_format == "mxfp4"
    model = Generator.load(storage="packed", progress=False).model
    assert isinstance(model.params.backbone["layers"]["swa_moe"]["mlp"]["down"], MXFP4Weight)


def test_it_writes_a_function_that_works(generator):
    asked = next(p for p in load("code") if "keep_above_15(" in p.messages[-1]["content"])
    answer = generator.chat(asked.messages, max_new_tokens=250)
    assert answer.finish_reason == "stop"
    names = {}
    exec(answer.text.split("```python\n")[1].split("```")[0], names)
    assert names["keep_above_15"]([60, 7, 15, 38]) == [60, 38]


@pytest.mark.slow
def test_drafts_change_nothing_but_speed(generator):
    asked = [prompts(generator.tokenizer, name)[0] for name in SCENARIOS]
    settings = SamplingParams(max_new_tokens=120)
    fast = generator.generate_batch(asked, settings)
    plain = generator.generate_batch(asked, settings, decoding=Decoding(verify_length=1))
    assert [c.token_ids for c in fast] == [c.token_ids for c in plain]
    assert sum(c.stats.rounds for c in fast) < 0.6 * sum(c.stats.new_tokens for c in fast)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_acceptance_is_what_was_recorded(generator, scenario):
    """Greedy, over all prompts; another processor may round a near tie the other way, and go on differently."""
    whole = next(r for r in recorded("acceptance")["acceptance"] if (r["scenario"], r["temperature"]) == (scenario, 0))
    ids = prompts(generator.tokenizer, scenario)
    assert whole["prompts"] == len(load(scenario))
    found = measure(generator, scenario, ids, SamplingParams(max_new_tokens=256), batch=8)
    np.testing.assert_allclose(found.accepted_length, whole["accepted_length"], rtol=0.03)
    np.testing.assert_allclose(found.perplexity, whole["perplexity"], rtol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology",
    [
        Topology(8, expert_parallel=8, dense_tensor_parallel=1),
        Topology(8, 2, 8, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1),
        Topology(8, 8, 8, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1),
        Topology(16, 2, 16, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1),
    ],
)
def test_the_same_tokens_on_meshes(generator, topology):

    asked = [prompts(generator.tokenizer, name)[1] for name in SCENARIOS]
    settings = [SamplingParams(max_new_tokens=60, temperature=t, seed=7) for t in (0, 0, 1, 0.7, 0)]
    expected = generator.generate_batch(asked, settings)
    got = Generator.load(topology=topology, progress=False).generate_batch(asked, settings)
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]
