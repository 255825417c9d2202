"""The five scenarios as token ids: frozen prompts, and held-out text of the training mixture."""

from mimo_jax.evaluation.prompts import SCENARIOS, load
from mimo_jax.evaluation.quality import Text
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training.corpus.mixture import held_out
from mimo_jax.training.tokens import tokenize

__all__ = ["SCENARIOS", "held_out_texts", "prompts"]


def prompts(tokenizer: Tokenizer, scenario: str) -> list[list[int]]:
    """The frozen prompts of a scenario."""
    return [tokenizer.encode_chat(p.messages) for p in load(scenario)]


def held_out_texts(tokenizer: Tokenizer, scenario: str, count: int, longest: int) -> list[Text]:
    """Held-out documents of a scenario, first answer each, of at most `longest` tokens."""
    texts = []
    for document in held_out(scenario, count):
        tokens = tokenize([document.text if document.text is not None else document.messages[:2]], tokenizer)
        start = max(1, int(tokens.answer.argmax()))
        ids = tokens.ids[:longest].tolist()
        if len(ids) > start:
            texts.append(Text(ids[:start], ids[start:]))
    return texts
