"""Text in and out: encoding, chat prompts, decoding token by token, stop strings.

The family's tokenizer is Qwen2-style byte-level BPE: a token is a run of bytes, not of characters. Decoding therefore
uses a table of bytes per id and an incremental UTF-8 decoder, which is exact, takes constant time per token and
withholds three bytes at most, whatever the model emits.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mimo_jax.chat_template import ChatTemplate, ChatTemplateError, Message, default_chat_template, plain_messages

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|mimo_audio_eod|>")
"""Tokens that end a text in every model of the family that has them."""


class TokenizerError(ValueError):
    """A tokenizer file that is missing, malformed or of a kind this code does not know; names the file."""


class Tokenizer:
    """A checkpoint's tokenizer.

    Two kinds of added tokens: *special* ones (`<|im_end|>`, ...) steer the model, and text becomes one only where the
    caller says so; the others (`<think>`, `<tool_call>`, ...) are words like any other and are always recognised.

    Args:
        backend: A byte-level BPE of the `tokenizers` library.
        eos_ids: Ids that end a text.
        chat_template: How conversations are written.
        source: What errors call it, usually its file.

    Raises:
        TokenizerError: The backend is no byte-level BPE.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_ids: Iterable[int],
        chat_template: ChatTemplate,
        source: str = "tokenizer",
    ) -> None:
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise TokenizerError(f"{source}: expected byte-level BPE (decoder ByteLevel), not {backend.decoder!r}")
        self._backend = backend
        # Special tokens are cut out of the text by _split; what the backend sees is ordinary text.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        special = {i: token for i, token in added.items() if token.special}
        self._special = {token.content: i for i, token in special.items()}
        self._split = _splitter(special, source)
        self._bytes = _byte_table(backend.get_vocab(with_added_tokens=True), added, source)
        self.chat_template = chat_template
        self.special_ids = frozenset(special)
        """Ids of special tokens; they have no text in a decoded answer."""
        self.eos_ids = tuple(sorted(set(eos_ids)))
        """Ids that end a text."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a Hugging Face folder.

        Needs `tokenizer.json`; uses `tokenizer_config.json`, `generation_config.json`, `config.json` and
        `chat_template.jinja` where they are. The stop set is what these name as end of text plus `STOP_TOKENS`.

        Raises:
            TokenizerError: A file is missing or malformed.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path}: no such file; a model folder needs it to read and write text")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: cannot be read as a tokenizer: {error}") from error
        settings = _read_json(folder / "tokenizer_config.json")
        eos = {i for name in STOP_TOKENS if (i := backend.token_to_id(name)) is not None}
        if (token := _token_text(settings.get("eos_token"))) and (i := backend.token_to_id(token)) is not None:
            eos.add(i)
        for file in (folder / "generation_config.json", folder / "config.json"):
            eos |= _eos_ids(file)
        return cls(backend, eos, _chat_template(folder, settings), str(path))

    @property
    def vocab_size(self) -> int:
        """Largest id + 1. The model's own vocabulary is padded beyond it."""
        return len(self._bytes)

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text as in `tokenizer.json`, such as `<|im_end|>`; None if there is none."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text; nothing is added before or after.

        Args:
            text: Any text.
            parse_special: Read `<|im_end|>` and the like as the special tokens they spell. Right for text rendered from
                a template, wrong for text from a stranger, who could otherwise end their turn and begin another role's.
        """
        if not parse_special:
            return self._backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for i, piece in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self._special[piece])
            elif piece:
                ids += self._backend.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary have no text."""
        return b"".join(self.token_bytes(i, skip_special=skip_special) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        """The bytes one token stands for; none for an id beyond the vocabulary."""
        if not 0 <= token < len(self._bytes) or (skip_special and token in self.special_ids):
            return b""
        return self._bytes[token]

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Text of a conversation, for people to read; see `ChatTemplate.render`. To prompt a model use `encode_chat`.

        Raises:
            ChatTemplateError: A malformed message, content other than text, or the template's own refusal.
        """
        return self.chat_template.render(messages, tools, enable_thinking, add_generation_prompt)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, in which only the template can write special tokens.

        `<|im_end|>` inside a message stays the ten characters that it is. To that end every spelling of a special token
        in messages and tools is broken up by a mark that occurs nowhere else, and the mark is taken out again after the
        template's own special tokens have been found. Other arguments and errors as for `render_chat`.
        """
        given = (plain_messages(messages), list(tools or ()))
        mark = _unused_character(json.dumps(given, ensure_ascii=False, default=str))
        guarded, guarded_tools = _map_strings(given, lambda s: self._split.sub(lambda m: mark.join(m[0]), s))
        text = self.chat_template.render(guarded, guarded_tools, enable_thinking, add_generation_prompt)
        ids: list[int] = []
        for i, piece in enumerate(self._split.split(text)):
            ids += [self._special[piece]] if i % 2 else self.encode(piece.replace(mark, ""))
        return ids


class StreamDecoder:
    """Text of one growing list of ids, piece by piece; all pieces together are `Tokenizer.decode` of all ids.

    A piece ends before an unfinished character, so that nobody is shown half of one.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Take the next token; gives the text that became complete."""
        return self._decoder.decode(self._tokenizer.token_bytes(token, skip_special=self._skip_special))

    def flush(self) -> str:
        """End the text: an unfinished character becomes U+FFFD. The decoder is then ready for another text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class StopStrings:
    """Ends a streamed text before the first stop string, wherever the pieces were cut.

    The first is the one complete first; if two are complete at the same character, the longer. Text that may yet turn
    out to be the beginning of one is held back.

    Args:
        stops: None of them empty.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stops)
        if not all(self._stops):
            raise ValueError("a stop string must not be empty")
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: the text is over."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Take more text; gives what is certain to lie before any stop string. Nothing after the end."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        certain, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return certain

    def flush(self) -> str:
        """End the text: what was held back is no stop string after all."""
        rest, self._held = self._held, ""
        return rest


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark` without being all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def _splitter(special: Mapping[int, tokenizers.AddedToken], source: str) -> re.Pattern[str]:
    """A pattern whose `split` puts special tokens at odd places. The first in the text wins, then the longest."""
    for i, token in special.items():
        if token.lstrip or token.rstrip or token.single_word or len(token.content) < 2:
            raise TokenizerError(
                f"{source}: special token {i} ({token.content!r}) must be two characters or more, without "
                "lstrip, rstrip and single_word"
            )
    spellings = sorted((re.escape(token.content) for token in special.values()), key=len, reverse=True)
    return re.compile(f"({'|'.join(spellings) or '(?!)'})")


def _byte_table(vocab: Mapping[str, int], added: Mapping[int, Any], source: str) -> list[bytes]:
    """Bytes of every id. Ordinary tokens spell a byte as one printable character (GPT-2's map); added ones are text."""
    table = [b""] * (1 + max(vocab.values(), default=-1))
    of_character = byte_of_character()
    for token, i in vocab.items():
        if i in added:
            table[i] = token.encode()
            continue
        try:
            table[i] = bytes(of_character[c] for c in token)
        except KeyError as error:
            raise TokenizerError(
                f"{source}: token {i} ({token!r}) is not byte-level BPE: {error.args[0]!r} stands for no byte"
            ) from None
    return table


def byte_of_character() -> dict[str, int]:
    """GPT-2's map of bytes to printable characters, inverted: Latin-1's visible ones stand for themselves, the other 68
    bytes for the characters from U+0100 on, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(visible)]
    return {chr(b): b for b in visible} | {chr(0x100 + n): b for n, b in enumerate(hidden)}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, not {type(value).__name__}")
    return value


def _token_text(value: Any) -> str | None:
    """A token as `tokenizer_config.json` names it: a string, or an object with its content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _eos_ids(path: Path) -> set[int]:
    value = _read_json(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise TokenizerError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
    return set(ids)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate:
    """The folder's own template (a file wins over a key), else the family's."""
    path, inline = folder / "chat_template.jinja", settings.get("chat_template")
    if isinstance(inline, list):  # several, by name
        inline = next((t.get("template") for t in inline if isinstance(t, dict) and t.get("name") == "default"), None)
    try:
        if path.is_file():
            name, source = str(path), path.read_text(encoding="utf-8")
        elif inline is not None:
            name, source = f"{folder / 'tokenizer_config.json'}: chat_template", inline
        else:
            name, source = "the default chat template", default_chat_template()
    except (UnicodeDecodeError, OSError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error
    if not isinstance(source, str):
        raise TokenizerError(f"{name} must be a string, not {type(source).__name__}")
    named = ("bos_token", "eos_token", "pad_token", "unk_token")
    try:
        return ChatTemplate(source, name, {key: text for key in named if (text := _token_text(settings.get(key)))})
    except ChatTemplateError as error:
        raise TokenizerError(str(error)) from error


def _unused_character(text: str) -> str:
    """A character that does not occur: one of Unicode's noncharacters, which no text should hold."""
    for code in [*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900)]:
        if chr(code) not in text:
            return chr(code)
    raise ChatTemplateError("the conversation holds every noncharacter and private-use character of Unicode")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same nesting of lists and mappings with every string, keys included, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(k, change): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(v, change) for v in value]
    return value
