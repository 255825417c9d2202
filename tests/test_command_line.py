"""The command as a person meets it: text out, files out, and one clear line for what cannot be done."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mimo_jax.cli import main
from mimo_jax.evaluation.score import score
from mimo_jax.model import LoadOptions, load_model
from mimo_jax.synthesize import synthesize


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    synthesize("tiny", folder, seed=0)
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_json_traces_its_rounds(checkpoint, capsys):
    options = ("--max-new-tokens", 8, "--ignore-eos", "--json", "--trace")
    code, out, _ = run(capsys, "generate", "--model", checkpoint, "--prompt", "Hello", *options)
    assert code == 0
    answer, total = map(json.loads, out.splitlines())
    assert len(answer["token_ids"]) == 8
    assert answer["finish_reason"] == "length"
    picked = [t for r in answer["trace"] for t in r["tokens"][: r["emitted"]]]
    assert answer["token_ids"][1:] == picked
    assert total["total"]["rounds"] == len(answer["trace"]) == len(answer["accept_lengths"])
    code, text, err = run(capsys, "generate", "--model", checkpoint, "--prompt", "Hello", *options[:3])
    assert code == 0
    assert text == answer["text"] + "\n"
    assert "accepted length" in err


def test_inspect_reads_headers(checkpoint, capsys):
    code, out, _ = run(capsys, "inspect", checkpoint, "--json")
    description = json.loads(out)
    assert code == 0
    assert description["drafter"]["block_size"] == 8
    assert any(part["name"] == "mtp" for part in description["backbone"]["skipped"])
    assert run(capsys, "inspect", checkpoint)[0] == 0


def test_score_in_chunks_equals_one_forward(checkpoint, capsys, tmp_path):
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(np.arange(20).reshape(2, 10).tolist()))
    save_file({"input_ids": np.arange(20).reshape(2, 10)}, tmp_path / "ids.safetensors")
    whole, chunked = tmp_path / "whole.safetensors", tmp_path / "chunked.safetensors"
    common = ("score", "--model", checkpoint)
    assert run(capsys, *common, "--ids", ids, "--out", whole, "--hidden-states")[0] == 0
    assert run(capsys, *common, "--ids", tmp_path / "ids.safetensors", "--out", chunked, "--chunk", 4)[0] == 0
    logits = load_file(whole)["logits"]
    np.testing.assert_allclose(load_file(chunked)["logits"], logits, atol=2e-5)
    assert load_file(whole)["hidden_states"].shape == (8, 2, 10, 256)


RUNS = ["mimo.prenorm.p0", "plain.prenorm.p3"]


@pytest.mark.parametrize("name", RUNS)
def test_generate_equals_a_golden_run(golden_dir, capsys, name):
    """Drafts, accepted lengths and tokens of an independent implementation, through the command alone."""
    folder, golden = golden_dir / "dflash_tiny", load_file(golden_dir / "dflash_tiny" / "e2e_golden.safetensors")
    prompt, tokens, lengths = (golden[f"{name}.{part}"] for part in ("prompt", "tokens", "accept_lengths"))
    drafter = folder / f"drafter_{name.split('.')[0]}"
    options = ("--max-new-tokens", tokens.size, "--swa-visible-keys", 8, "--drafter", drafter, "--json", "--trace")
    given = ("--model", folder / "target", "--prompt-ids", json.dumps(prompt.ravel().tolist()))
    code, out, _ = run(capsys, "generate", *given, *options)
    assert code == 0
    answer = json.loads(out.splitlines()[0])
    assert answer["token_ids"] == tokens.ravel().tolist()
    assert answer["accept_lengths"] == lengths.ravel().tolist()
    assert [r["drafts"] for r in answer["trace"]] == golden[f"{name}.blocks"][:, 1:].tolist()


def test_score_equals_the_library(golden_dir, capsys, tmp_path):
    folder = golden_dir / "dflash_tiny" / "target"
    flat = np.arange(1, 12)
    save_file({"input_ids": flat}, tmp_path / "ids.safetensors")
    out = tmp_path / "out.safetensors"
    common = ("score", "--model", folder, "--ids", tmp_path / "ids.safetensors", "--out", out)
    assert run(capsys, *common, "--swa-visible-keys", 8, "--hidden-states", "--chunk", 5)[0] == 0
    expected = score(load_model(folder, LoadOptions(swa_visible_keys=8)), flat[None], hidden_states=True)
    written = load_file(out)
    for name in ("logits", "hidden_states"):
        np.testing.assert_allclose(written[name], expected[name], atol=2e-5)


def test_score_draft_equals_the_golden(golden_dir, capsys, tmp_path):
    folder = golden_dir / "dflash_tiny"
    golden = load_file(folder / "block_golden.safetensors")
    given = {"features": golden["ctx12.target_features"], "anchors": golden["ctx12.anchor_token"]}
    save_file(given, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    options = ("--drafter", folder / "drafter_random", "--features", tmp_path / "in.safetensors", "--out", out)
    assert run(capsys, "score-draft", "--model", folder / "target", *options)[0] == 0
    np.testing.assert_allclose(load_file(out)["logits"], golden["ctx12.mimo.logits"], atol=2e-5)


def _tensors(path, **arrays):
    save_file(arrays, path)
    return path


FEATURES = np.zeros((1, 4, 192), np.float32)
BAD_SCORES = [
    ("score", {"input_ids": np.array([[1, 500]])}, (), ("in.safetensors", "500 is outside the vocabulary")),
    ("score", {"input_ids": np.array([[0.5]])}, (), ("in.safetensors", "integer matrix")),
    ("score", {"tokens": np.array([[1]])}, (), ("in.safetensors", "input_ids")),
    ("score-draft", {"features": FEATURES, "anchors": np.array([1])}, ("--drafter", "none"), ("no drafter",)),
    ("score-draft", {"features": FEATURES[..., :64], "anchors": np.array([1])}, (), ("in.safetensors", "192")),
    ("score-draft", {"features": FEATURES, "anchors": np.array([900])}, (), ("in.safetensors", "anchors", "900")),
    ("score-draft", {"features": FEATURES}, (), ("in.safetensors", "anchors")),
    (
        "score-draft",
        {"features": FEATURES, "anchors": np.array([1]), "positions": np.array([5])},
        (),
        ("in.safetensors", "positions"),
    ),
]


@pytest.mark.parametrize(("command", "tensors", "options", "said"), BAD_SCORES)
def test_bad_scores_name_the_file_and_what_is_wrong(golden_dir, capsys, tmp_path, command, tensors, options, said):
    folder, given = golden_dir / "dflash_tiny", _tensors(tmp_path / "in.safetensors", **tensors)
    flag = "--ids" if command == "score" else "--features"
    drafter = () if options or command == "score" else ("--drafter", folder / "drafter_random")
    out = tmp_path / "out.safetensors"
    common = (command, "--model", folder / "target", flag, given, "--out", out)
    code, _, err = run(capsys, *common, *options, *drafter)
    assert code == 2
    assert err.startswith("error: ")
    for part in said:
        assert part in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("ids.json", "{"), ("ids.json", '{"a": 1}'), ("ids.json", "[[]]"), ("ids.safetensors", "x"), ("ids.json", "\xff")],
)
def test_malformed_files_of_ids_are_refused_by_name(checkpoint, capsys, tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    common = ("score", "--model", checkpoint, "--out", tmp_path / "out.safetensors")
    code, _, err = run(capsys, *common, "--ids", tmp_path / name)
    assert code == 2
    assert err.startswith(f"error: {tmp_path / name}: ")


CHATS = [
    ("{", "not JSON"),
    ('{"role": "user"}', "a list of chat messages"),
    ("[1, 2]", "a list of chat messages"),
    ('[{"role": "user"}]', "content"),
    ('[{"content": "x"}]', "role"),
]


@pytest.mark.parametrize(("text", "said"), CHATS)
def test_malformed_chats_are_refused(checkpoint, capsys, tmp_path, text, said):
    (tmp_path / "chat.json").write_text(text)
    code, _, err = run(capsys, "generate", "--model", checkpoint, "--chat", tmp_path / "chat.json")
    assert code == 2
    assert err.startswith("error: ")
    assert said in err


@pytest.mark.parametrize(
    ("text", "said"), [("", "no prompt"), ('"a"\n{', ":2: not JSON"), ("7", ":1: a prompt must be")]
)
def test_malformed_files_of_prompts_name_the_line(checkpoint, capsys, tmp_path, text, said):
    (tmp_path / "p.jsonl").write_text(text)
    code, _, err = run(capsys, "generate", "--model", checkpoint, "--prompt-file", tmp_path / "p.jsonl")
    assert code == 2
    assert f"{tmp_path / 'p.jsonl'}" in err
    assert said in err


def test_text_needs_a_tokenizer(golden_dir, capsys):
    folder = golden_dir / "dflash_tiny" / "target"
    code, _, err = run(capsys, "generate", "--model", folder, "--prompt", "a")
    assert code == 2
    assert "tokenizer.json" in err
    assert "--prompt-ids" in err
    code, out, _ = run(capsys, "generate", "--model", folder, "--prompt-ids", "[1, 2]", "--max-new-tokens", 3)
    assert code == 0
    assert len(json.loads(out)) == 3


def test_synthesize_overwrites_only_if_told(capsys, tmp_path):
    folder = tmp_path / "model"
    assert run(capsys, "synthesize", "--preset", "tiny", "--out", folder)[0] == 0
    before = (folder / "config.json").stat().st_mtime_ns
    code, _, err = run(capsys, "synthesize", "--preset", "tiny", "--out", folder)
    assert code == 2
    assert str(folder) in err
    assert "overwrite" in err
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert run(capsys, "synthesize", "--preset", "tiny", "--out", folder, "--overwrite")[0] == 0


COMMANDS = ("generate", "inspect", "synthesize", "score", "score-draft", "bench")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_option_is(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: mimo-jax {command}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\b", out, re.MULTILINE)


BAD = [
    (("--prompt", "a", "--max-new-tokens", "-1"), "max_new_tokens"),
    (("--prompt", "a", "--temperature", "nan"), "temperature"),
    (("--prompt", "a", "--top-p", "2"), "top_p"),
    (("--prompt", "a", "--max-new-tokens", "2000000"), "context"),
    (("--prompt-ids", "[1, 99999]"), "99999 is outside the vocabulary"),
    (("--prompt-ids", "[]"), "prompt"),
    (("--prompt-ids", "[1, 2"), "not JSON"),
    (("--prompt-ids", "[1]", "--stop-token-id", "99999"), "stop_token_ids"),
    (("--prompt-ids", "[1]", "--logit-bias", "99999:1"), "logit_bias"),
    (("--prompt-ids", "[1]", "--logit-bias", "x"), "ID:BIAS"),
    (("--prompt", "a", "--verify-length", "9"), "verify_length"),
    (("--prompt", "a", "--drafter", "/no/such"), "no such drafter folder"),
    (("--prompt-file", "/no/such"), "/no/such"),
    (("--prompt-ids", '"text"'), "--prompt-ids"),
    (("--prompt-ids", "[" * 100_000), "not JSON"),
]


@pytest.mark.parametrize(("options", "named"), BAD, ids=[" ".join(b[0])[:60] for b in BAD])
def test_bad_requests_get_one_clear_line(checkpoint, capsys, options, named):
    code, out, err = run(capsys, "generate", "--model", checkpoint, *options)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert named in err
    assert "Traceback" not in err


def test_images_are_refused(checkpoint, capsys, tmp_path):
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]))
    code, _, err = run(capsys, "generate", "--model", checkpoint, "--chat", chat)
    assert code == 2
    assert "image" in err


def test_outputs_are_checked_before_anything_is_loaded(checkpoint, capsys, tmp_path):
    (tmp_path / "ids.json").write_text("[[1, 2], [3]]")
    common = ("score", "--model", checkpoint, "--ids", tmp_path / "ids.json", "--out")
    code, _, err = run(capsys, *common, tmp_path / "out.safetensors")
    assert code == 2
    assert "of one length" in err
    (tmp_path / "ids.json").write_text("[1, 2]")
    code, _, err = run(capsys, *common, tmp_path / "none" / "out.safetensors")
    assert code == 2
    assert "does not exist" in err


def test_prompts_come_from_files_and_stdin(checkpoint, capsys, tmp_path, monkeypatch):
    lines = ["plain text", [1, 2, 3], [{"role": "user", "content": "hi"}]]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--max-new-tokens", 3, "--json")
    code, out, _ = run(capsys, "generate", "--model", checkpoint, "--prompt-file", tmp_path / "p.jsonl", *options)
    assert code == 0
    assert len(out.splitlines()) == 4
    monkeypatch.setattr("sys.stdin", io.StringIO("plain text"))
    code, piped, _ = run(capsys, "generate", "--model", checkpoint, *options)
    assert code == 0
    assert json.loads(piped.splitlines()[0])["token_ids"] == json.loads(out.splitlines()[0])["token_ids"]


@pytest.mark.parametrize("damage", ["truncated", "missing file", "no config", "drafter of another size"])
def test_damaged_checkpoints_get_one_clear_line(checkpoint, capsys, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    weights = sorted(folder.glob("*.safetensors"))[0]
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing file":
        weights.unlink()
    elif damage == "no config":
        (folder / "config.json").unlink()
    else:
        config = json.loads((folder / "dflash" / "config.json").read_text())
        (folder / "dflash" / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    code, out, err = run(capsys, "generate", "--model", folder, "--prompt", "a")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    names = {"no config": "config.json", "drafter of another size": "hidden_size"}
    named = names[damage] if damage in names else weights.name  # noqa: SIM401 (pyright reads .get as optional)
    assert named in err


def test_debug_shows_the_traceback(capsys, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        main(["generate", "--model", str(tmp_path), "--prompt", "a", "--debug"])


@pytest.mark.slow
def test_bench_writes_figures(checkpoint, capsys, tmp_path):
    out = tmp_path / "bench.json"
    sizes = ("--prompt-tokens", 16, "--new-tokens", 16, "--runs", 2, "--contexts", "64,256")
    assert run(capsys, "bench", "decode", "--model", checkpoint, *sizes, "--json", out)[0] == 0
    results = json.loads(out.read_text())
    assert [r["verify_length"] for r in results["decode"]] == [1, 8]
    assert all(r["decode_tokens_per_second"]["median"] > 0 for r in results["decode"])
    assert [r["context"] for r in results["context"]] == [64, 256]
