"""A small working tokenizer in the family's format, for synthetic checkpoints and models trained from scratch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mimo_jax.chat_template import default_chat_template
from mimo_jax.tokenizer import byte_of_character

# Qwen2's pre-tokenizer: contractions, words, single digits, punctuation, line breaks, blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

SMALLEST_VOCABULARY = 256 + len(_SPECIAL) + len(_PLAIN)


@dataclass(frozen=True)
class ByteTokenizerIds:
    """Ids of a byte tokenizer; those from `vocab_size` to the model's own vocabulary stand for nothing."""

    endoftext: int
    """`<|endoftext|>`, also the padding."""
    im_start: int
    """`<|im_start|>`."""
    im_end: int
    """`<|im_end|>`, the end of a turn."""
    mask: int
    """`<|mask|>`: the drafter's mask token. No text and no template ever contains it."""
    vocab_size: int
    """Largest id + 1."""


def build_byte_tokenizer(vocab_size: int, text: Iterable[str] = ()) -> tuple[tokenizers.Tokenizer, ByteTokenizerIds]:
    """A byte-level BPE with the family's normalisation, word splitting and added tokens.

    Ids 0..255 are the bytes, in order; then come the merges learnt from `text`, then the added tokens.

    Args:
        vocab_size: Rows of the model's embedding. At most this many ids are used; merges take what is left over.
        text: What to learn merges from; none without it.

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes and the added tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size is {vocab_size}: a byte tokenizer needs {SMALLEST_VOCABULARY}, 256 bytes and "
            f"{SMALLEST_VOCABULARY - 256} added tokens"
        )
    vocab = dict(sorted(byte_of_character().items(), key=lambda item: item[1]))
    merges = _learn_merges(text, vocab_size - SMALLEST_VOCABULARY)
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = _untrained()
    tokenizer.model = models.BPE(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _PLAIN])
    endoftext, im_start, im_end, mask = (len(vocab) + i for i in range(len(_SPECIAL)))
    return tokenizer, ByteTokenizerIds(endoftext, im_start, im_end, mask, tokenizer.get_vocab_size())


def write_byte_tokenizer(folder: str | Path, vocab_size: int, text: Iterable[str] = ()) -> ByteTokenizerIds:
    """Write a byte tokenizer into a folder in the Hugging Face layout; see `build_byte_tokenizer` for the arguments.

    Writes `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, ids = build_byte_tokenizer(vocab_size, text)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {str(i): {"content": t.content, **flags, "special": t.special} for i, t in added},
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "do_sample": True,
            "eos_token_id": [ids.im_end, ids.endoftext],
            "pad_token_id": ids.endoftext,
            "temperature": 1.0,
            "top_p": 0.95,
        },
    )
    (folder / "chat_template.jinja").write_text(default_chat_template(), encoding="utf-8")
    return ids


def _untrained() -> tokenizers.Tokenizer:
    """Everything but the vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _learn_merges(text: Iterable[str], count: int) -> list[tuple[str, str]]:
    if count == 0:
        return []
    trainer = trainers.BpeTrainer(
        vocab_size=256 + count,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer = _untrained()
    tokenizer.train_from_iterator(text, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
