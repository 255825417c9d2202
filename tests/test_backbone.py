"""The backbone against independent references: every golden checkpoint, full, chunked and cached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mimo_jax.cache import RingKV
from mimo_jax.evaluation.score import score
from mimo_jax.request import SamplingParams
from mimo_jax.session import Session
from tests.conftest import golden_folders, golden_id
from tests.models import golden_model, started, tiny_model

FOLDERS = [
    (folder / sub, folder / "golden.safetensors")
    for kind, subs in (
        ("backbone_*f32", ("",)),
        ("backbone_*bf16", ("",)),
        ("backbone_*fused_qkv", ("canonical_concat", "tp_interleaved")),
        ("backbone_*mxfp4", ("",)),
    )
    for folder in golden_folders(kind)
    for sub in subs
    if (folder / sub / "config.json").exists()
]
CASES = pytest.mark.parametrize(
    ("folder", "golden"),
    FOLDERS,
    ids=[golden_id(f if (f / "README.txt").exists() else f.parent) + f"-{f.name}" for f, _ in FOLDERS],
)


def _model(folder, convention, **options):
    window = golden_model(folder, router_dtype="float32", qkv_layout=_layout(folder)).config.sliding_window
    visible = window if convention == "hf" else window + 1
    return golden_model(folder, router_dtype="float32", qkv_layout=_layout(folder), swa_visible_keys=visible, **options)


def _layout(folder):
    return "canonical" if folder.name == "canonical_concat" else "auto"


def _prefix(folder):
    return "f32." if "bf16" in folder.name else ""


@CASES
@pytest.mark.parametrize("convention", ["hf", "sg"])
def test_logits_and_hidden_states_equal_the_reference(folder, golden, convention):
    expected = load_file(golden)
    model = _model(folder, convention, storage="packed")
    got = score(model, expected["input_ids"], hidden_states=True)
    prefix = f"{_prefix(folder)}{convention}"
    np.testing.assert_allclose(got["logits"], expected[f"{prefix}.logits"], atol=2e-5, rtol=0)
    if f"{prefix}.hidden_states" in expected:
        np.testing.assert_allclose(got["hidden_states"], expected[f"{prefix}.hidden_states"], atol=5e-5, rtol=0)


@CASES
def test_greedy_tokens_equal_the_reference(folder, golden):
    convention = "hf" if "bf16" in folder.name else "sg"  # logits are compared under both
    expected = load_file(golden)
    prompts = expected["input_ids"].tolist()
    tokens = expected[f"{_prefix(folder)}{convention}.greedy_tokens"]
    settings = [SamplingParams(max_new_tokens=tokens.shape[1], ignore_eos=True)] * len(prompts)
    session = Session(_model(folder, convention), prompts, settings)
    got = session.prefill().tokens
    while session.active.any():
        got = [a + b for a, b in zip(got, session.step().tokens, strict=True)]
    np.testing.assert_array_equal(got, tokens)


@CASES
@pytest.mark.parametrize("chunk", [5])
def test_chunks_through_the_caches_equal_one_forward(folder, golden, chunk):
    ids = load_file(golden)["input_ids"]
    model = _model(folder, "sg")
    whole, chunked = score(model, ids, hidden_states=True), score(model, ids, chunk=chunk, hidden_states=True)
    for name in ("logits", "hidden_states"):
        np.testing.assert_allclose(chunked[name], whole[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("folder", golden_folders("backbone_*bf16"), ids=golden_id)
@pytest.mark.parametrize("convention", ["hf", "sg"])
def test_bfloat16_is_as_close_as_bfloat16_can_be(folder, convention):
    expected = load_file(folder / "golden.safetensors")
    got = score(_model(folder, convention, dtype="bfloat16"), expected["input_ids"])["logits"]
    strict, loose = expected[f"f32.{convention}.logits"], expected[f"bf16.{convention}.logits"]
    reference = np.abs(loose - strict).mean()
    # a near tie in the router moves whole rows, in the reference as here: the median tells rounding from faults
    assert np.median(np.abs(got - strict)) <= 2 * np.median(np.abs(loose - strict))
    assert np.abs(got - strict).mean() <= max(4 * reference, 0.1)
    assert (got.argmax(-1) == strict.argmax(-1)).mean() >= 0.9


def test_rows_after_the_valid_ones_change_nothing(seed):
    models, params = tiny_model(seed)
    settings = [SamplingParams(max_new_tokens=8)] * 3
    prompts = [[5, 6, 7, 8, 9, 10, 11], [1, 2, 3], [40]]
    state, _, first = started(models, params, prompts, settings, chunk=16)
    for row, prompt in enumerate(prompts):
        alone, _, alone_first = started(models, params, [prompt], settings[:1])
        assert first[row] == alone_first[0]
        assert int(state.cache.lengths[row]) == len(prompt)
        for kind, cache in alone.cache.kv.items():
            ours = state.cache.kv[kind]
            if isinstance(ours, RingKV):
                np.testing.assert_allclose(ours.k[:, row], cache.k[:, 0], atol=1e-5)
            else:
                pages = np.asarray(ours.table)[row]
                np.testing.assert_allclose(np.asarray(ours.k)[:, pages], np.asarray(cache.k), atol=1e-5)


def test_programs_lower_for_gpus(seed):
    """Nothing in the round belongs to a CPU: the whole program lowers for CUDA without one."""
    from mimo_jax.speculative import decode

    models, params = tiny_model(seed)
    state, requests, _ = started(models, params, [[1, 2, 3]], [SamplingParams(max_new_tokens=4)])
    traced = decode.trace(models, params, state, requests, rounds=2, verify_length=8)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in text
    assert "callback" not in text


def test_float32_matmuls_do_not_become_tf32(seed):
    models, params = tiny_model(seed)
    state, _, _ = started(models, params, [[1, 2, 3]], [SamplingParams(max_new_tokens=4)])
    backbone = models.backbone

    def forward(p, tokens, cache):
        bound = backbone.bind(p)
        return bound.logits(bound(tokens, cache).hidden)

    text = jax.jit(forward).lower(params.backbone, jnp.ones((1, 4), jnp.int32), state.cache).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)
