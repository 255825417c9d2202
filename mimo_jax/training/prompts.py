"""What the generated documents ask, each with what its document answers."""

import random
from collections.abc import Iterator, Sequence

from mimo_jax.chat_template import Message
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training.corpus.mixture import documents
from mimo_jax.training.tokens import end_of_text, turns

_SOURCES = {"web": 0.7, "math": 2.5, "code": 2.0, "library": 0.3, "chat": 2.0, "edits": 2.5, "drills": 0.5}
"""How often prompts are of each source: no more than a few drills, which are there to pretrain on."""

_BEGINNING = 32  # tokens of a plain text that are given


def asked(tokenizer: Tokenizer, seed: int, reworded: float = 0.0) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts as token ids, without end: every turn of a conversation, and the beginning of every plain text.

    With each comes the document's own answer, which is not what a model says.

    Args:
        tokenizer: The model's.
        seed: Names the stream.
        reworded: Share of conversations whose requests are worded as in no document. A drafter has to follow its
            backbone there, too.
    """
    end = end_of_text(tokenizer)
    rng = random.Random(f"reworded {seed}")
    words = ["."]  # of the conversation before
    for found in documents(_SOURCES, seed):
        if found.text is not None:
            ids = [*tokenizer.encode(found.text), end]
            yield ids[:_BEGINNING], ids[_BEGINNING:]
        messages = found.messages
        if messages and rng.random() < reworded:
            messages = tuple(
                m | {"content": _reworded(m["content"], words, rng)} if m["role"] == "user" else m for m in messages
            )
        words = [word for m in found.messages if m["role"] == "user" for word in m["content"].split()] or words
        before: list[int] = []
        for given, answer in turns(messages, tokenizer):
            yield before + given, answer
            before += given + answer


def asked_late(tokenizer: Tokenizer, seed: int, context: int) -> Iterator[list[int]]:
    """Prompts of at least `context` tokens, without end: generated conversations one after the other as a single one,
    up to the last question.
    """
    messages: list[Message] = []
    for found in documents(_SOURCES, seed):
        if found.messages:
            messages += found.messages
            prompt = tokenizer.encode_chat(messages[:-1])
            if len(prompt) >= context:
                yield prompt
                messages = []


def _reworded(request: str, others: Sequence[str], rng: random.Random) -> str:
    """A request whose sentences change places, and words are left out, moved, or replaced by `others`; code stays."""
    prose, fence, code = request.partition("\n\n```")
    sentences = prose.split(". ")
    rng.shuffle(sentences)
    rate = rng.random() / 2
    words: list[str] = []
    for word in ". ".join(sentences).split(" "):
        how = rng.choice(("left out", "replaced", "moved")) if rng.random() < rate else ""
        if how != "left out":
            words.insert(len(words) - (how == "moved"), rng.choice(others) if how == "replaced" else word)
    return " ".join(words or sentences) + fence + code
