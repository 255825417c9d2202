"""What generated documents ask, as written and reworded."""

from itertools import islice

import numpy as np

from mimo_jax.presets import NANO
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training.prompts import asked

COUNT = 80


def prompts(tokenizer: Tokenizer, seed: int, *reworded: float) -> list[tuple[list[int], list[int]]]:
    return list(islice(asked(tokenizer, seed, *reworded), COUNT))


def test_reworded_requests_keep_code_answers_and_plain_texts(seed):
    tokenizer = Tokenizer.from_folder(NANO)
    as_written, reworded = prompts(tokenizer, seed), prompts(tokenizer, seed, 1.0)
    assert [answer for _, answer in reworded] == [answer for _, answer in as_written]
    changed = []
    for (one, _), (other, _) in zip(as_written, reworded, strict=True):
        old, new = tokenizer.decode(one), tokenizer.decode(other)
        last = [text.rpartition("\n\n```")[2].partition("```")[0] for text in (old, new)]
        assert last[0] == last[1] or "\n\n```" not in old
        assert old.startswith("system") or old == new
        changed.append(old != new)
    assert np.mean(changed) > 0.5
    assert prompts(tokenizer, seed, 1.0) == reworded


def test_a_share_of_conversations_is_reworded(seed):
    tokenizer = Tokenizer.from_folder(NANO)
    none, some, all_ = (prompts(tokenizer, seed, share) for share in (0.0, 0.5, 1.0))
    changed, at_most = (np.mean([a != b for a, b in zip(none, other, strict=True)]) for other in (some, all_))
    assert none == prompts(tokenizer, seed)
    assert 0 < changed < at_most
