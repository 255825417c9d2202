"""Self-distillation: the model that will be served answers prompts, and its drafter learns from those answers only.

Answers are appended to a file as they are made, so a run that was stopped goes on where it was.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mimo_jax.generate import Generator
from mimo_jax.model import Model
from mimo_jax.request import SamplingParams
from mimo_jax.session import Session
from mimo_jax.training import TrainingError
from mimo_jax.training.answers import read_answers


def regenerate(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    out: Path,
    *,
    batch: int = 16,
    progress: Callable[[int], None] = lambda answered: None,
) -> None:
    """Answer prompts, and write the answers in the order of the prompts.

    Args:
        generator: The exact serving target: the released weights, as they will be served.
        prompts: Token ids.
        params: Settings, without stop strings and penalties; prompt i is sampled with seed `params.seed` + i.
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
    asked = [_Asked(list(p), replace(params, seed=(params.seed + i) % 2**32)) for i, p in enumerate(prompts)]
    written = len(done)
    with out.open("a", encoding="utf-8") as file:
        for finished in _answer(generator.model, asked[written:], batch):
            progress(finished)
            while written < len(asked) and asked[written].finished:
                line = {"prompt_ids": asked[written].prompt, "answer_ids": asked[written].answer}
                file.write(json.dumps(line) + "\n")
                written += 1
            file.flush()


@dataclass
class _Asked:
    """A prompt, and as much of its answer as there is."""

    prompt: list[int]
    params: SamplingParams
    answer: list[int] = field(default_factory=list)
    finished: bool = False


def _answer(model: Model, asked: Sequence[_Asked], batch: int) -> Iterator[int]:
    """Finish all answers; gives how many were, every now and then.

    A batch would wait for its longest answer. It is left instead when a quarter of its rows go on, which wait for
    others as long and go on with these. Samples are keyed by seed and position, so an answer is the same in pieces.
    """
    fresh, begun = deque(asked), deque[_Asked]()
    while fresh or begun:
        queue = begun if len(begun) >= batch or not fresh else fresh
        rows = [queue.popleft() for _ in range(min(batch, len(queue)))]
        left = len(rows) // 4 if fresh or begun else 0
        settings = [replace(r.params, max_new_tokens=r.params.max_new_tokens - len(r.answer)) for r in rows]
        session = Session(model, [r.prompt + r.answer for r in rows], settings)
        step = session.prefill()
        while True:
            for row, tokens in zip(rows, step.tokens, strict=True):
                row.answer += tokens
            if session.active.sum() <= left:
                break
            step = session.step()
        for row, active in zip(rows, session.active, strict=True):
            row.finished = not active
        begun += [row for row in rows if not row.finished]
        yield sum(row.finished for row in rows)
