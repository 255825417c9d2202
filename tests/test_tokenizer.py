"""Encoding, decoding and streaming against the `tokenizers` library and hand-written expectations."""

import codecs
import json
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.byte_tokenizer import SMALLEST_VOCABULARY, build_byte_tokenizer, write_byte_tokenizer
from mimo_jax.chat_template import ChatTemplate, default_chat_template
from mimo_jax.tokenizer import StopStrings, StreamDecoder, Tokenizer, TokenizerError, byte_of_character

LESSONS = ["The quick brown fox jumps over the lazy dog. ", "naïve café, 東京タワー, 🙂🙃 and 12345 numbers\n"] * 20
VOCABULARY = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder, VOCABULARY, LESSONS)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def oracle(folder) -> tokenizers.Tokenizer:
    """The library alone, which reads special tokens in any text."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<|im_",
    "end|>",
    " ",
    "\n",
    "fox",
    "é",
    "東京",
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=8).map("".join)
ids_beyond = st.lists(st.integers(0, VOCABULARY + 50), max_size=60)


class TestEncode:
    @given(text=texts)
    def test_parse_special_equals_the_library(self, tokenizer, oracle, text):
        assert tokenizer.encode(text, parse_special=True) == oracle.encode(text, add_special_tokens=False).ids

    @given(text=texts)
    def test_raw_text_never_becomes_special(self, tokenizer, text):
        ids = tokenizer.encode(text)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)

    def test_words_of_the_chat_format_are_always_read(self, tokenizer):
        assert tokenizer.encode("<think>a") == [tokenizer.token_id("<think>"), ord("a")]

    def test_nothing_is_added(self, tokenizer):
        assert tokenizer.encode("") == []
        assert tokenizer.encode("Z") == [ord("Z")]

    def test_merges_are_used(self, tokenizer):
        assert len(tokenizer.encode("The quick brown fox")) < len("The quick brown fox") // 2


class TestDecode:
    @given(ids=ids_beyond, skip_special=st.booleans())
    def test_equals_the_library(self, tokenizer, oracle, ids, skip_special):
        expected = oracle.decode([i for i in ids if i < tokenizer.vocab_size], skip_special_tokens=skip_special)
        assert tokenizer.decode(ids, skip_special=skip_special) == expected

    def test_ids_without_text(self, tokenizer):
        assert tokenizer.decode([tokenizer.vocab_size, 10**9, -1]) == ""

    def test_byte_map_is_the_librarys(self):
        table = byte_of_character()
        assert sorted(table) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        for byte in range(0x80):
            (character,) = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(byte))[0][0]
            assert table[character] == byte


class TestStreamDecoder:
    @given(ids=ids_beyond, skip_special=st.booleans())
    @settings(max_examples=300)
    def test_pieces_are_the_whole(self, tokenizer, ids, skip_special):
        stream = StreamDecoder(tokenizer, skip_special=skip_special)
        pieces = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)

    @given(data=st.lists(st.integers(0x70, 0xFF), max_size=40))
    def test_bytes_that_are_no_utf8(self, tokenizer, data):
        """Ids 0..255 are bytes here, so any damaged UTF-8 can be streamed; never more than 3 bytes are withheld."""
        stream, text = StreamDecoder(tokenizer), ""
        for n, byte in enumerate(data, 1):
            text += stream.push(byte)
            whole = bytes(data[:n]).decode(errors="replace")
            assert any(text + bytes(data[max(0, n - k) : n]).decode(errors="replace") == whole for k in range(4))
        assert text + stream.flush() == bytes(data).decode(errors="replace")

    def test_half_a_character_is_not_shown(self, tokenizer):
        stream = StreamDecoder(tokenizer)
        assert [stream.push(b) for b in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]

    def test_a_run_of_bad_bytes_is_not_withheld(self, tokenizer):
        stream = StreamDecoder(tokenizer)
        assert [stream.push(0x80) for _ in range(3000)] == ["\ufffd"] * 3000

    def test_flush_ends_and_begins_anew(self, tokenizer):
        stream = StreamDecoder(tokenizer)
        assert stream.push(0xE2) == ""
        assert stream.flush() == "\ufffd"
        assert [stream.push(b) for b in "é".encode()] == ["", "é"]

    def test_special_tokens_do_not_cut_a_character(self, tokenizer):
        stream = StreamDecoder(tokenizer)
        first, *rest = "é".encode()
        assert [stream.push(i) for i in (first, tokenizer.token_id("<|mask|>"), *rest)] == ["", "", "é"]


def cut(text: str, stops: list[str]) -> str:
    """What is left of a text, letter by letter."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


class TestStopStrings:
    @given(
        pieces=st.lists(st.text("abc", max_size=4), max_size=12),
        stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    )
    @settings(max_examples=500)
    def test_equals_the_letter_by_letter_cut(self, pieces, stops):
        stream, text, shown = StopStrings(stops), "".join(pieces), ""
        for n, piece in enumerate(pieces, 1):
            shown += stream.push(piece)
            held = len("".join(pieces[:n])) - len(shown)
            assert stream.stopped or held < max(map(len, stops), default=1)
        shown += stream.flush()
        assert shown == cut(text, stops)
        assert stream.stopped == any(stop in text for stop in stops)
        assert stream.matched is None or text.startswith(shown + stream.matched)

    def test_across_pieces(self):
        stream = StopStrings(["STOP"])
        assert [stream.push(p) for p in ("one S", "T", "ART S", "TO", "P two", "three")] == [
            "one ",
            "",
            "START ",
            "",
            "",
            "",
        ]
        assert (stream.stopped, stream.matched, stream.flush()) == (True, "STOP", "")

    def test_no_stop_strings(self):
        stream = StopStrings()
        assert stream.push("anything") == "anything"
        assert (stream.flush(), stream.stopped) == ("", False)

    def test_held_text_comes_at_the_end(self):
        stream = StopStrings(["\n\nQ:"])
        assert stream.push("A\n\n") == "A"
        assert stream.flush() == "\n\n"

    def test_empty_stop_string(self):
        with pytest.raises(ValueError, match="must not be empty"):
            StopStrings(["x", ""])


class TestFromFolder:
    def test_stop_set_is_the_union(self, folder, tokenizer, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        im_end, endoftext = tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>")
        assert Tokenizer.from_folder(tmp_path).eos_ids == tuple(sorted((im_end, endoftext)))
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
        (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|mask|>"}}')
        assert set(Tokenizer.from_folder(tmp_path).eos_ids) == {7, 9, im_end, endoftext, tokenizer.token_id("<|mask|>")}

    def test_missing_file(self, tmp_path):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
            Tokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("tokenizer.json", "{", r"tokenizer\.json: cannot be read as a tokenizer"),
            ("tokenizer.json", '{"model": 3}', r"tokenizer\.json: cannot be read as a tokenizer"),
            ("tokenizer_config.json", "{", r"tokenizer_config\.json: cannot be read as JSON"),
            ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object, not list"),
            (
                "tokenizer_config.json",
                '{"chat_template": 3}',
                r"tokenizer_config\.json: chat_template must be a string",
            ),
            ("tokenizer_config.json", '{"chat_template": "{% if %}"}', r"chat_template, line 1"),
            ("generation_config.json", '{"eos_token_id": "x"}', r"generation_config\.json: eos_token_id must be"),
            ("generation_config.json", '{"eos_token_id": [true]}', r"generation_config\.json: eos_token_id must be"),
            ("chat_template.jinja", "a\n{% for %}", r"chat_template\.jinja, line 2"),
            ("chat_template.jinja", b"\xff\xfe", r"chat_template\.jinja: cannot be read"),
        ],
    )
    def test_malformed_files(self, folder, tmp_path, name, content, message):
        (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_folder(tmp_path)

    def test_other_kinds_of_tokenizer(self, tmp_path):
        tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(TokenizerError, match="expected byte-level BPE"):
            Tokenizer.from_folder(tmp_path)

    def test_tokens_that_are_no_bytes(self):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"ab": 0, "a▁": 1}, merges=[]))
        backend.decoder = tokenizers.decoders.ByteLevel()
        with pytest.raises(TokenizerError, match=r"mine: token 1 \('a▁'\) is not byte-level BPE"):
            Tokenizer(backend, (), ChatTemplate(""), "mine")

    def test_special_tokens_of_an_unknown_kind(self):
        backend, _ = build_byte_tokenizer(SMALLEST_VOCABULARY)
        backend.add_special_tokens([tokenizers.AddedToken("<|odd|>", lstrip=True)])
        with pytest.raises(TokenizerError, match=r"mine: special token \d+ \('<\|odd\|>'\)"):
            Tokenizer(backend, (), ChatTemplate(""), "mine")


class TestByteTokenizer:
    def test_without_text_a_token_is_a_byte(self, tmp_path):
        ids = write_byte_tokenizer(tmp_path, 320)
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.encode("añ🙂") == list("añ🙂".encode())
        assert ids.vocab_size == tokenizer.vocab_size == SMALLEST_VOCABULARY
        assert (ids.endoftext, ids.im_start, ids.im_end, ids.mask) == (256, 257, 258, 259)
        assert tokenizer.special_ids == {256, 257, 258, 259}
        assert tokenizer.eos_ids == (256, 258)
        assert tokenizer.token_id("<|mask|>") == ids.mask

    @pytest.mark.parametrize("size", [SMALLEST_VOCABULARY, SMALLEST_VOCABULARY + 1, 300, 5000])
    def test_fits_the_vocabulary(self, size):
        backend, ids = build_byte_tokenizer(size, LESSONS)
        vocab = backend.get_vocab(with_added_tokens=True)
        assert sorted(vocab.values()) == list(range(ids.vocab_size))
        assert ids.vocab_size <= size
        assert size > 1000 or ids.vocab_size == size

    def test_too_small_a_vocabulary(self):
        with pytest.raises(ValueError, match=r"vocab_size is 100: a byte tokenizer needs 266"):
            build_byte_tokenizer(100)

    def test_learning_is_repeatable(self):
        assert build_byte_tokenizer(350, LESSONS)[0].to_str() == build_byte_tokenizer(350, LESSONS)[0].to_str()

    def test_files(self, folder, tokenizer):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        named = {int(i): token["content"] for i, token in settings["added_tokens_decoder"].items()}
        assert named == {tokenizer.token_id(content): content for content in named.values()}
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [
            tokenizer.token_id("<|im_end|>"),
            tokenizer.token_id("<|endoftext|>"),
        ]
        assert (folder / "chat_template.jinja").read_text() == default_chat_template()


def test_python_and_rust_replace_bad_bytes_alike(oracle):
    """The two decoders agree on how many U+FFFD a damaged character is: the ground `decode` stands on."""
    damaged = [b"\xe2\x82", b"\xf0\x9f\x99", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80", b"\xe2\x28\xa1"]
    for data in damaged:
        assert oracle.decode(list(data)) == codecs.decode(data, "utf-8", "replace")
