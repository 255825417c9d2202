"""What the generated documents ask, each with what its document answers."""

from collections.abc import Iterator

from mimo_jax.chat_template import Message
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training.corpus.mixture import documents
from mimo_jax.training.tokens import end_of_text, turns

_SOURCES = {"web": 0.7, "math": 2.5, "code": 2.0, "library": 0.3, "chat": 2.0, "edits": 2.5, "drills": 0.5}
"""How often prompts are of each source: no more than a few drills, which are there to pretrain on."""

_BEGINNING = 32  # tokens of a plain text that are given


def asked(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts as token ids, without end: every turn of a conversation, and the beginning of every plain text.

    With each comes the document's own answer, which is not what a model says.
    """
    end = end_of_text(tokenizer)
    for found in documents(_SOURCES, seed):
        if found.text is not None:
            ids = [*tokenizer.encode(found.text), end]
            yield ids[:_BEGINNING], ids[_BEGINNING:]
        before: list[int] = []
        for given, answer in turns(found.messages, tokenizer):
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
