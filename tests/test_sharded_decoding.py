"""Decoding on meshes: the same tokens as on one device, greedy and sampled, with weights where the topology says."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mimo_jax.cli import main
from mimo_jax.evaluation.score import score, score_draft
from mimo_jax.generate import Generator
from mimo_jax.model import LoadOptions, load_model
from mimo_jax.request import SamplingParams
from mimo_jax.session import Decoding
from mimo_jax.synthesize import synthesize
from sharding.topology import Topology
from tests.conftest import golden_folders, golden_id

PROMPTS = ([5, 6, 7, 8, 9] * 9, [300, 17], [44])
SETTINGS = [
    SamplingParams(max_new_tokens=20, logit_bias={77: -3.0, 400: 2.0}),
    SamplingParams(max_new_tokens=20, temperature=1.0, seed=3, top_p=0.8, top_k=40, presence_penalty=0.4),
    SamplingParams(max_new_tokens=20, temperature=0.7, seed=3, repetition_penalty=1.3),
]
ONE = Topology()
TWO_BY_TWO = Topology(4, 2, 4, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "tiny"
    synthesize("tiny", out, seed=11)
    return out


@pytest.fixture(scope="module")
def expected(folder):
    return tokens(folder, ONE)


def tokens(folder, topology, storage="expanded"):
    generator = Generator.load(folder, topology=topology, storage=storage, progress=False)
    return [c.token_ids for c in generator.generate_batch(PROMPTS, SETTINGS)]


def test_two_groups_of_two(folder, expected):
    assert tokens(folder, TWO_BY_TWO) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "storage"),
    [
        (Topology(2), "packed"),
        (Topology(2, expert_parallel=2), "expanded"),
        (Topology(8, expert_parallel=8, dense_tensor_parallel=1), "packed"),
        (Topology(4, 2, 2, dp_attention=True), "expanded"),
        (Topology(4, 2, 2, dp_attention=True), "packed"),
        (Topology(8, 8, 8, dp_attention=True, dp_lm_head=True), "expanded"),
        (Topology(8, 4, 4, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1), "packed"),
        (Topology(8, 2, 8, dp_attention=True, dense_tensor_parallel=1), "expanded"),
    ],
)
def test_any_topology(folder, expected, topology, storage):
    assert tokens(folder, topology, storage) == expected


def meshes(data, tensor, *expert_parallel):
    """A mesh data x tensor with every placement of experts that is asked for."""
    return [Topology(data * tensor, data, e, dp_attention=data > 1) for e in expert_parallel]


@pytest.mark.slow
@pytest.mark.parametrize("topology", [*meshes(1, 8, 1, 8), *meshes(2, 4, 1, 2, 4, 8), *meshes(8, 1, 1, 8)])
@pytest.mark.parametrize("folder", golden_folders("backbone_tiny_f32"), ids=golden_id)
def test_golden_logits_on_a_mesh(folder, topology):
    """Hidden states and logits of the independent reference, with KV heads copied where the mesh is wider than they."""
    expected = load_file(folder / "golden.safetensors")
    model = load_model(folder, LoadOptions(topology=topology, router_dtype="float32"))
    got = score(model, expected["input_ids"], hidden_states=True)
    np.testing.assert_allclose(got["logits"], expected["sg.logits"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(got["hidden_states"], expected["sg.hidden_states"], atol=5e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("topology", meshes(2, 8, 1, 2, 8))
@pytest.mark.parametrize("folder", golden_folders("backbone_tiny_f32"), ids=golden_id)
def test_golden_tokens_on_two_groups_of_eight(folder, topology):
    expected = load_file(folder / "golden.safetensors")
    generator = Generator.load(folder, topology=topology, router_dtype="float32", progress=False)
    tokens = expected["sg.greedy_tokens"]
    settings = SamplingParams(max_new_tokens=tokens.shape[1], ignore_eos=True)
    got = generator.generate_batch(expected["input_ids"].tolist(), settings)
    np.testing.assert_array_equal([c.token_ids for c in got], tokens)


@pytest.mark.slow
@pytest.mark.parametrize("topology", [TWO_BY_TWO, Topology(8, 4, 4, dp_attention=True, dense_tensor_parallel=1)])
def test_bfloat16_on_a_mesh(folder, topology):
    """Rounded sums in another order: logits within what bfloat16's 8 bits make of it."""
    ids = np.random.default_rng(5).integers(0, 500, (3, 40)).astype(np.int32)
    one, many = (
        score(load_model(folder, LoadOptions(topology=t, dtype="bfloat16", storage="expanded")), ids)["logits"]
        for t in (ONE, topology)
    )
    error = np.abs(one - many)
    assert np.median(error) < 0.02 * np.abs(one).std()
    assert np.mean(one.argmax(-1) == many.argmax(-1)) > 0.9


@pytest.mark.slow
def test_sampled_drafts_and_stop_strings_on_a_mesh(folder):
    """Drafts drawn and verified by rejection; a row that the host stops while the others go on."""
    found = []
    for topology in (ONE, TWO_BY_TWO):
        generator = Generator.load(folder, topology=topology, progress=False)
        drawn = generator.generate_batch(PROMPTS, SETTINGS, decoding=Decoding(sampled_drafts=True))
        halves = [drawn[0].text[4:6], drawn[1].text[2:4], ""]
        stopping = [replace(s, stop=(text,) if text else ()) for s, text in zip(SETTINGS, halves, strict=True)]
        stopped = generator.generate_batch(PROMPTS, stopping, decoding=Decoding(rounds_per_dispatch=2))
        found.append([(c.token_ids, c.text, c.finish_reason) for c in (*drawn, *stopped)])
    assert found[0] == found[1]
    assert "stop" in {reason for _, _, reason in found[0][3:]}


@pytest.mark.slow
@pytest.mark.parametrize("topology", [TWO_BY_TWO, Topology(8, 1, 8, dense_tensor_parallel=1)])
def test_drafter_logits_on_a_mesh(folder, topology):
    rng = np.random.default_rng(2)
    one, many = (load_model(folder, LoadOptions(topology=t)) for t in (ONE, topology))
    config = one.drafter_config
    assert config is not None
    features = rng.normal(size=(3, 70, len(config.target_layer_ids) * config.hidden_size)).astype(np.float32)
    anchors, positions = np.array([5, 300, 17]), np.array([70, 3, 66])
    expected, got = (score_draft(model, features, anchors, positions) for model in (one, many))
    for name in ("logits", "hidden"):
        np.testing.assert_allclose(got[name], expected[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("storage", ["expanded", "packed"])
def test_weights_lie_where_the_topology_says(folder, storage):
    """Each device's share of all weights: experts and vocabulary in quarters."""
    model = Generator.load(folder, topology=TWO_BY_TWO, storage=storage, progress=False).model
    experts = model.params.backbone["layers"]["swa_moe"]["mlp"]["down"]
    shards = [leaf.addressable_shards for leaf in jax.tree.leaves(experts)]
    assert all(s.data.shape[1] == 16 // 4 for leaf in shards for s in leaf)
    assert {s.index[1].start for s in shards[0]} == {0, 4, 8, 12}
    head = model.params.backbone["lm_head"]
    assert [s.data.shape[0] for s in head.addressable_shards] == [256] * 4


def test_a_topology_that_does_not_fit_is_refused(folder, capsys):
    assert main(["generate", "--model", str(folder), "--prompt", "x", "--tp-size", "64", "--ep-size", "64"]) == 2
    assert "cannot be cut into 64" in capsys.readouterr().err
