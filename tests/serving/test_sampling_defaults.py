"""What requests in text are sampled with that say nothing about it."""

import json

import pytest

from mimo_jax.presets import NANO
from mimo_jax.request import SamplingParams
from serve.sampling_defaults import sampling_defaults


def test_the_models_own_come_first(tmp_path):
    given = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.05,
        "eos_token_id": 3,
        "min_p": None,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    own = SamplingParams(temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.05)
    assert sampling_defaults(tmp_path, "model") == own
    assert sampling_defaults(tmp_path, "openai") == SamplingParams(temperature=1.0)
    assert sampling_defaults(NANO, "model") == SamplingParams(temperature=1.0, top_p=0.95)


def test_a_model_that_recommends_nothing(tmp_path):
    assert sampling_defaults(tmp_path, "model") == SamplingParams(temperature=1.0)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7}')
    assert sampling_defaults(tmp_path, "model") == SamplingParams(temperature=0.0)


@pytest.mark.parametrize("text", ['{"temperature": -1}', '{"top_p": "high"}', "[]", "{"])
def test_what_cannot_be_is_told_with_the_file(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config.json: .*--sampling-defaults openai"):
        sampling_defaults(tmp_path, "model")
    assert sampling_defaults(tmp_path, "openai").temperature == 1.0
