"""The engine over meshes and in bfloat16, on small checkpoints."""

from pathlib import Path

import numpy as np
import pytest

from mimo_jax.evaluation.score import log_probabilities
from mimo_jax.model import LoadOptions, Model, load_model
from mimo_jax.request import SamplingParams
from mimo_jax.synthesize import synthesize
from serve.engine.executor import Executor
from serve.generation import GenerationRequest, RoundTokens
from sharding.topology import Topology
from tests.serving.engines import CAPACITY, answers, offline, serving, sizes, tokens_of

pytestmark = pytest.mark.slow

TWO_GROUPS = Topology(8, 2, 8, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("placement") / "tiny"
    synthesize("tiny", out, seed=11)
    return out


@pytest.fixture(scope="module")
def alone(folder) -> Model:
    return load_model(folder, LoadOptions())


@pytest.mark.parametrize("topology", [TWO_GROUPS, Topology(4, expert_parallel=4)], ids=["DP2 x TP4, EP8", "TP4, EP4"])
async def test_a_mesh_gives_the_tokens_of_one_device(folder, alone, topology, rng):
    """Greedy and sampled; there are more requests than slots, and some begin alike."""
    beginning = rng.integers(0, alone.config.vocab_size, 40).tolist()
    asked = [
        GenerationRequest(
            f"r{i}",
            [*(beginning if i % 2 else ()), *rng.integers(0, alone.config.vocab_size, 1 + 9 * i).tolist()],
            SamplingParams(16, temperature=float(i % 3 > 0), top_p=0.9, frequency_penalty=0.2, seed=i, ignore_eos=True),
        )
        for i in range(6)
    ]
    model = load_model(folder, LoadOptions(topology=topology))
    device = Executor(model, sizes(groups=topology.data_parallel, slots=2, prefills=((1, 16),)), CAPACITY)
    async with serving(device, model) as engine:
        given = await answers(engine, asked)
    device.close()
    for request, events in zip(asked, given, strict=True):
        assert tokens_of(events) == offline(alone, list(request.prompt_ids), request.sampling)


async def test_sent_back_in_bfloat16_it_goes_on_under_the_same_distribution(folder, rng):
    """What it has written is computed anew, in shapes that round apart; what it is conditioned on is the same."""
    model = load_model(folder, LoadOptions(dtype="bfloat16"))
    device = Executor(model, sizes(pages=9, snapshots=2, prefills=((1, 16),)), CAPACITY)
    asked = [
        GenerationRequest(
            f"r{i}",
            rng.integers(0, model.config.vocab_size, 30).tolist(),
            SamplingParams(60, temperature=1.0, seed=i, ignore_eos=True),
            logprobs=True,
        )
        for i in range(3)
    ]
    async with serving(device, model) as engine:
        given = await answers(engine, asked)
        assert engine._scheduler.retractions > 0
    device.close()
    right, wrong = [], []
    for request, events in zip(asked, given, strict=True):
        tokens, prompt = tokens_of(events), list(request.prompt_ids)
        told = [k.logprob for e in events if isinstance(e, RoundTokens) for k in e.logprobs]
        assert len(told) == len(tokens) == 60
        for of, context in ((right, prompt), (wrong, prompt[:-1])):
            expected = log_probabilities(model, context, tokens)
            of.append(np.abs(np.asarray(told) - expected[np.arange(60), tokens]))
    # single ones are up to 1 apart, sent back or not: routers choose other experts where rounding decides
    assert np.quantile(right, 0.75) < 0.1
    assert np.median(wrong) > 4 * np.median(right)  # one token less of context shows
