"""Self-distillation: the model that will be served answers prompts, and its drafter learns from those answers only.

Answers are appended to a file as they are made, so a run that was stopped goes on where it was.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mimo_jax.generate import Generator
from mimo_jax.request import SamplingParams
from mimo_jax.training import TrainingError
from mimo_jax.training.tokens import Tokens


def regenerate(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    out: Path,
    *,
    batch: int = 16,
    progress: Callable[[int], None] = lambda answered: None,
) -> None:
    """Answer prompts, a batch at a time, in order.

    Args:
        generator: The exact serving target: the released weights, as they will be served.
        prompts: Token ids.
        params: Settings; prompt i is sampled with seed `params.seed` + i.
        out: JSON lines of `prompt_ids` and `answer_ids`; what it holds already is not made again.
        batch: Prompts at a time.
        progress: Told of answers as they are made; first of those that were there.

    Raises:
        TrainingError: `out` holds answers to other prompts.
    """
    done = [prompt for prompt, _ in read_answers(out)] if out.exists() else []
    if done != [list(p) for p in prompts[: len(done)]]:
        raise TrainingError(f"{out}: holds answers to other prompts; choose another file")
    progress(len(done))
    with out.open("a", encoding="utf-8") as file:
        for start in range(len(done), len(prompts), batch):
            part = prompts[start : start + batch]
            settings = [replace(params, seed=(params.seed + start + i) % 2**32) for i in range(len(part))]
            for completion in generator.generate_batch(part, settings):
                line = {"prompt_ids": completion.prompt_ids, "answer_ids": completion.token_ids}
                file.write(json.dumps(line) + "\n")
            file.flush()
            progress(len(part))


def read_answers(path: Path) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and answers, in order; a last line that was cut short is left out."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            pair = json.loads(line)
            yield pair["prompt_ids"], pair["answer_ids"]
        except (ValueError, KeyError, TypeError):
            if number > 1 and not line.endswith("}"):
                return
            raise TrainingError(f"{path}:{number}: not an object of prompt_ids and answer_ids") from None


def answers_as_tokens(path: Path) -> Tokens:
    """All prompts and answers in one row.

    Raises:
        TrainingError: There are none.
    """
    ids: list[int] = []
    answer: list[bool] = []
    for prompt, answered in read_answers(path):
        ids += prompt + answered
        answer += [False] * len(prompt) + [True] * len(answered)
    if not any(answer):
        raise TrainingError(f"{path}: holds no answers to learn from")
    return Tokens(np.array(ids, np.int32), np.array(answer, bool))
