"""`mimo-jax train` from text to a model that drafts, and one clear line for what cannot be trained."""

import json

import pytest

from mimo_jax.cli import main
from mimo_jax.training import ablation_command


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    assert main(["train", "corpus", "--out", str(folder), "--documents", "40", "--vocab-size", "512"]) == 0
    return folder


SMALL = ("--preset", "tiny", "--batch", 2, "--length", 64, "--checkpoint-every", 2)


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    """A model folder after every step of training, and the folder of the runs."""
    runs = tmp_path_factory.mktemp("runs")
    plain, qat, model = runs / "plain", runs / "qat", runs / "model"
    answers, drafter = runs / "answers.jsonl", runs / "drafter"
    backbone, few = ("backbone", "--corpus", corpus), ("--prompts", 12, "--max-new-tokens", 24, "--batch", 6)
    mesh = ("--tp", 2, "--dp", 2, "--ep", 2, "--enable-dp-attention", "--cut-sequences")
    drafting = ("--anchors", 8, "--edges", "exchange", *mesh)
    steps = [
        (*backbone, "--out", plain, "--steps", 3, *SMALL),
        (*backbone, "--out", qat, "--steps", 2, *SMALL, "--qat", "--start-from", plain, "--optimizer", "adamw", *mesh),
        ("export", "--run", qat, "--corpus", corpus, "--out", model),
        ("regenerate", "--model", model, "--out", answers, *few),
        ("drafter", "--model", model, "--answers", answers, "--out", drafter, "--steps", 3, *SMALL, *drafting),
        ("export", "--run", drafter, "--out", model / "dflash"),
    ]
    for step in steps:
        assert main([str(a) for a in ("train", *step)]) == 0
    # the same command again finds nothing left to do; another setting is refused
    assert main([str(a) for a in ("train", *steps[0])]) == 0
    assert main([str(a) for a in ("train", *steps[0], "--learning-rate", 1)]) == 2
    return model, runs


@pytest.mark.slow
def test_from_text_to_a_model_that_drafts(model, capsys):
    folder, runs = model
    asked = ("--prompt", "def", "--max-new-tokens", 9, "--ignore-eos", "--json", "--trace")
    code, out, _ = run(capsys, "generate", "--model", folder, *asked)
    assert code == 0
    assert len(json.loads(out.splitlines()[0])["trace"][0]["drafts"]) == 7
    assert len((runs / "drafter" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_drafter_goes_on_with_long_rows(model, capsys, tmp_path):
    """It begins as the drafter that it is given: a step of no size leaves that."""
    folder, _ = model
    answers, tuned = tmp_path / "answers.jsonl", tmp_path / "run"
    late = ("--context", 300, "--prompts", 3, "--max-new-tokens", 60)
    assert run(capsys, "train", "regenerate", "--model", folder, "--out", answers, *late)[0] == 0
    prompts = [len(json.loads(line)["prompt_ids"]) for line in answers.read_text().splitlines()]
    assert min(prompts) >= 300
    given = ("--model", folder, "--answers", answers, "--start-from", folder / "dflash", "--out", tuned)
    rows = ("--preset", "tiny", "--batch", 1, "--length", 1024, "--anchors", 16, "--steps", 1, "--learning-rate", 0)
    code, _, err = run(capsys, "train", "drafter", *given, *rows)
    assert code == 0, err
    assert run(capsys, "train", "export", "--run", tuned, "--out", tmp_path / "tuned")[0] == 0
    before, after = (next(d.glob("*.safetensors")) for d in (folder / "dflash", tmp_path / "tuned"))
    assert before.read_bytes() == after.read_bytes()
    code, _, err = run(capsys, "train", "drafter", *given[:-1], tmp_path / "other", *rows, "--preset", "small")
    assert code == 2
    assert "shape" in err or "does not fit" in err


@pytest.mark.slow
def test_an_ablation_goes_on_where_it_was(model, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_command, "SCENARIOS", ("web",))
    monkeypatch.setattr(ablation_command, "_LONGEST_FROZEN", 8)
    monkeypatch.setattr(ablation_command, "_LONGEST_ANSWER", 24)
    out = tmp_path / "ablation"
    given = ("--model", model[0], "--out", out, "--prompts", 6, "--held-out", 4, "--steps", 1, "--seeds", 1)
    rows = ("--batch", 2, "--length", 256, "--anchors", 8)
    code, _, err = run(capsys, "train", "ablate", *given, *rows, "--arm", "base")
    assert code == 0, err
    (first,) = (out / "results.jsonl").read_text().splitlines()
    (out / "results.jsonl").write_text(first + '\n{"arm": "block-1')
    code, table, err = run(capsys, "train", "ablate", *given, *rows, "--arm", "block-16")
    assert code == 0, err
    lines = (out / "results.jsonl").read_text().splitlines()
    assert lines[0] == first
    assert [json.loads(line)["arm"] for line in lines] == ["base", "block-16"]
    assert "block-16" in table
    found = json.loads((out / "ablation.json").read_text())["ablation"]
    shown = [(e["arm"], e["verify_length"], e["prompts"]) for e in found]
    assert shown == [
        (arm, n, name)
        for arm, name, n in [("base", "held-out", 8), ("base", "frozen", 8)]
        + [("block-16", name, n) for name in ("held-out", "frozen") for n in (8, 16)]
    ]
    assert (out / "ablation.png").stat().st_size > 1000
    code, _, err = run(capsys, "train", "ablate", *given, *rows, "--steps", 2)
    assert code == 2
    assert "other settings" in err


def test_a_corpus_folder_holds_text_and_its_tokenizer(corpus):
    about = json.loads((corpus / "corpus.json").read_text())
    assert about["documents"] == 40
    assert about["tokens"] > 5000
    assert {p.name for p in corpus.iterdir()} > {"tokenizer.json", "chat_template.jinja", "train.safetensors"}


def test_what_cannot_be_trained_gets_one_clear_line(corpus, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "answers.jsonl").write_text("")
    main(["train", "corpus", "--out", str(tmp_path / "short"), "--text", str(tmp_path / "short.txt")])
    main(["train", "corpus", "--out", str(tmp_path / "wide"), "--documents", "30", "--vocab-size", "900"])
    capsys.readouterr()
    train = ("backbone", "--out", tmp_path / "run", *SMALL, "--corpus")
    cases = [
        (("corpus", "--out", tmp_path / "a", "--text", tmp_path / "empty.txt"), "empty.txt: holds no text"),
        (("corpus", "--out", tmp_path / "b", "--vocab-size", 100), "vocab_size is 100"),
        (("corpus", "--out", corpus), "not empty"),
        (("corpus", "--out", tmp_path / "c", "--text", tmp_path / "none.txt"), "none.txt"),
        ((*train, tmp_path / "nowhere"), "train.safetensors: cannot be read"),
        ((*train, tmp_path / "short"), "less than one window"),
        ((*train, tmp_path / "wide"), "the tokenizer of another model"),
        ((*train, corpus, "--start-from", tmp_path), "no run.json"),
        (
            (*train, corpus, "--tp", 4, "--dp", 4, "--ep", 4, "--enable-dp-attention"),
            "2 rows cannot be shared equally by 4",
        ),
        ((*train, corpus, "--tp", 2, "--dp", 2), "without DP attention"),
        ((*train, corpus, "--length", 2_000_000), "more than the model's context"),
        (("export", "--run", tmp_path, "--out", tmp_path / "x"), "no run.json"),
        (("drafter", "--model", tmp_path, "--answers", tmp_path / "answers.jsonl", "--out", tmp_path / "d"), "config"),
    ]
    for arguments, said in cases:
        code, _, err = run(capsys, "train", *arguments)
        assert code == 2, arguments
        assert said in err
        assert "Traceback" not in err
