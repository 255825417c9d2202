"""How requests in text are sampled that say nothing about it."""

import json
from pathlib import Path
from typing import Literal

from mimo_jax.request import SamplingParams

_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def sampling_defaults(model: Path, source: Literal["model", "openai"]) -> SamplingParams:
    """OpenAI's, which are temperature 1 and nothing cut off; or the model's own where its makers recommend any.

    Args:
        model: The checkpoint's folder, with its `generation_config.json` if it has one.
        source: Who decides.

    Raises:
        ValueError: The file says what cannot be.
    """
    path = model / "generation_config.json"
    given = {}
    try:
        if source == "model" and path.is_file():
            given = json.loads(path.read_text())
            if not isinstance(given, dict):
                raise ValueError(f"expected a JSON object, not {type(given).__name__}")
        settings = {key: given[key] for key in _KEYS if given.get(key) is not None}
        if given.get("do_sample") is False:
            settings["temperature"] = 0.0
        return SamplingParams(**{"temperature": 1.0, **settings})
    except ValueError as error:
        raise ValueError(f"{path}: {error}; mend it, or start with --sampling-defaults openai") from None
