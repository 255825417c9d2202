"""Every flag is honoured, mapped, ignored with a note or rejected with a reason, and nothing is misread in silence."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.flag_kinds import Flag, FlagError, Not, To, Treatment, tokens
from serve.flag_table import ANSWERED, TABLE
from serve.flags import parse, parser
from tests.serving import release_card

ROWS = [flag for flags in TABLE.values() for flag in flags]
HONOURED = [flag for flag in ROWS if flag.treatment is Treatment.HONOURED]
MAPPED = [flag for flag in ROWS if flag.treatment is Treatment.MAPPED]

# The second wave of flags that pasted SGLang command lines have, beside the release card's, with a value each.
SECOND_WAVE = {
    "--served-model-name": "mimo",
    "--tokenizer-path": "DIR",
    "--revision": "main",
    "--download-dir": "DIR",
    "--load-format": "auto",
    "--chunked-prefill-size": "8192",
    "--max-prefill-tokens": "16384",
    "--max-running-requests": "32",
    "--max-queued-requests": "100",
    "--max-total-tokens": "1M",
    "--schedule-policy": "lpm",
    "--schedule-conservativeness": "0.3",
    "--disable-radix-cache": None,
    "--swa-full-tokens-ratio": "0.8",
    "--kv-cache-dtype": "auto",
    "--stream-interval": "4",
    "--random-seed": "7",
    "--grammar-backend": "xgrammar",
    "--reasoning-parser": "mimo",
    "--tool-call-parser": "mimo",
    "--chat-template": "FILE",
    "--enable-metrics": None,
    "--enable-cache-report": None,
    "--log-level": "info",
    "--log-requests": None,
    "--watchdog-timeout": "300",
    "--dist-timeout": "600",
    "--api-key": "KEY",
    "--admin-api-key": "KEY",
    "--ssl-keyfile": "FILE",
    "--ssl-certfile": "FILE",
    "--ssl-ca-certs": "FILE",
    "--grpc-mode": None,
    "--smg-grpc-mode": None,
}


def value_for(flag: Flag) -> list[str]:
    """Words that the flag takes."""
    if flag.settings.get("action") == "store_true":
        return []
    if "choices" in flag.settings:
        return [flag.settings["choices"][0]]
    read = flag.settings.get("type", str)
    for text in ("16", "0.5"):
        try:
            read(text)
        except argparse.ArgumentTypeError:
            continue
        return [text]
    raise AssertionError(flag)


def read_of(flag: Flag, words: list[str]) -> object:
    return flag.settings.get("type", str)(words[0]) if words else True


def destination(flag: Flag) -> str:
    return flag.names[0].removeprefix("--").replace("-", "_")


@pytest.mark.parametrize("flag", HONOURED, ids=lambda f: f.names[0])
def test_honoured_flags_are_read_under_all_their_names(flag):
    words = value_for(flag)
    for name in flag.names:
        arguments = parse([name, *words])
        assert getattr(arguments, destination(flag)) == read_of(flag, words)
        assert arguments.notes == []
    if words:
        assert getattr(parse([f"{flag.names[-1]}={words[0]}"]), destination(flag)) == read_of(flag, words)
        with pytest.raises(FlagError, match="expected one argument"):
            parse([flag.names[0]])


@pytest.mark.parametrize("flag", MAPPED, ids=lambda f: f.names[0])
def test_mapped_flags_translate_or_say_why_not(flag):
    default = getattr(parse([]), destination(flag))
    taken = 0
    for text, meaning in flag.settings["values"].items():
        for given_text in (text, text.upper()):
            words = [flag.names[-1], given_text]
            if isinstance(meaning, Not):
                with pytest.raises(FlagError) as caught:
                    parse(words)
                assert f"{flag.names[-1]} {given_text}" in str(caught.value)
                assert meaning.reason in str(caught.value)
            else:
                assert isinstance(meaning, To)
                arguments = parse(words)
                assert getattr(arguments, destination(flag)) == meaning.value
                assert [meaning.note in note for note in arguments.notes] == [True] * bool(meaning.note)
                taken += 1
    assert taken
    assert default == flag.settings["default"]
    with pytest.raises(FlagError, match=r"must be one of .* not 'nonsense'"):
        parse([flag.names[0], "nonsense"])


@pytest.mark.parametrize("flag", ANSWERED, ids=lambda f: f.names[0])
def test_other_flags_are_answered(flag):
    plain = vars(parse(["--port", "1"]))
    for name in flag.names:
        written = name.replace("*", "anything")
        for words in ([written], [written, "3"], [written, "-1"], [written, "1", "2"], [f"{written}=3"]):
            words = [*words, "--port", "1"]
            if flag.treatment is Treatment.REJECTED:
                with pytest.raises(FlagError) as caught:
                    parse(words)
                assert str(caught.value) == f"{written} is not supported: {flag.help}"
            else:
                arguments = parse(words)
                assert arguments.notes == [f"{written} has no effect: {flag.help}"]
                assert vars(arguments) == plain | {"notes": arguments.notes}


def test_every_row_has_one_treatment_and_every_name_one_row():
    assert {flag.treatment for flag in ROWS} == {Treatment.HONOURED, Treatment.MAPPED}
    assert {flag.treatment for flag in ANSWERED} == {Treatment.IGNORED, Treatment.REJECTED}
    effective = list(parser("test")._option_string_actions)
    for name in effective:
        assert not any(flag.matches(name) for flag in ANSWERED), name
    answered = [name for flag in ANSWERED for name in flag.names]
    for name in answered:
        assert sum(flag.matches(name.replace("*", "x")) for flag in ANSWERED) == 1, name


@pytest.mark.parametrize("rank", [0, 1])
def test_the_release_card_parses(rank):
    arguments = parse(release_card.flags(rank))
    assert (arguments.node_rank, arguments.nnodes, arguments.dist_init_addr) == (rank, 2, "10.0.0.1:20000")
    assert arguments.tensor_parallel_size == arguments.expert_parallel_size == 16
    assert arguments.speculative_algorithm == "DFLASH"
    assert len(arguments.notes) == 3  # on remote code, attention backends and the warm-up


@pytest.mark.parametrize("name", SECOND_WAVE)
def test_the_second_wave_parses(name):
    parse([name] if SECOND_WAVE[name] is None else [name, SECOND_WAVE[name]])


@pytest.mark.parametrize("name", ["--enable-ssl-refresh", "--ssl-keyfile-password"])
def test_what_would_be_unsafe_to_ignore_is_rejected(name):
    with pytest.raises(FlagError, match="is not supported"):
        parse([name])


def test_older_short_names_of_parallel_sizes():
    arguments = parse(["--tp", "8", "--dp", "2", "--ep", "8"])
    sizes = (arguments.tensor_parallel_size, arguments.data_parallel_size, arguments.expert_parallel_size)
    assert sizes == (8, 2, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--page-sise 1", "unknown flag --page-sise; did you mean --page-size?"),
        (
            "--tensor-parallel 2",
            "unknown flag --tensor-parallel; did you mean --tensor-parallel-size?",
        ),  # no shortening
        ("--qqq 1", "unknown flag --qqq; --help lists all"),
        ("-p 1", "unknown flag -p"),
        ("stray", "unexpected 'stray'"),
        ("--port 1 stray", "unexpected 'stray'"),
        ("--port 70000", "--port: must be a whole number from 0 to 65535, not '70000'"),
        ("--mem-fraction-static 1.5", "must be a number above 0 and below 1, not '1.5'"),
        ("--mem-fraction-static nan", "must be a number above 0 and below 1, not 'nan'"),
        ("--drain-timeout -1", "must be a number of seconds above 0, not '-1'"),
        ("--drain-timeout inf", "must be a number of seconds above 0"),
        ("--random-seed 4294967296", "from 0 to 4294967295"),
        ("--chunked-prefill-size -1", "must be a whole number of at least 1, not '-1'"),
        ("--speculative-algorithm EAGLE3", "use DFLASH, or NONE for plain decoding"),
        ("--dtype half", "use bfloat16"),
        ("--kv-cache-dtype fp8_e4m3", "use auto"),
        ("--load-format dummy", "mimo-jax synthesize"),
        ("--quantization awq", "must be one of auto, fp8, mxfp4, not 'awq'"),
    ],
)
def test_errors_say_what_to_do(words, message):
    with pytest.raises(FlagError) as caught:
        parse(words.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("65536", 65536), ("64k", 64_000), ("25.6k", 25_600), ("64Ki", 65_536), ("1M", 10**6), ("1Mi", 2**20)],
)
def test_numbers_of_tokens(text, count):
    assert tokens(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "64K", "64 k", "k", "1e6", "1kk", "0.0001k", "NaN", "½"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a number of tokens"):
        tokens(text)


@given(st.integers(1, 10**6), st.sampled_from(["k", "M", "G", "Ki", "Mi", "Gi"]))
def test_units_multiply(count, unit):
    prefix = {"k": 1, "M": 2, "G": 3}[unit[0].replace("K", "k")]
    assert tokens(f"{count}{unit}") == count * (1024 if unit.endswith("i") else 1000) ** prefix


def test_help_names_every_flag():
    text = parser("mimo-serve", "the end").format_help()
    names = [name for flag in (*ROWS, *ANSWERED) for name in flag.names]
    assert [name for name in names if name not in text] == []
    assert text.rstrip().endswith("the end")
