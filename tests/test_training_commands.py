"""`mimo-jax train` from text to a model that drafts, and one clear line for what cannot be trained."""

import json

import pytest

from mimo_jax.cli import main


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


@pytest.mark.slow
def test_from_text_to_a_model_that_drafts(corpus, capsys, tmp_path):
    plain, qat, model = tmp_path / "plain", tmp_path / "qat", tmp_path / "model"
    answers, drafter = tmp_path / "answers.jsonl", tmp_path / "drafter"
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
        code, _, err = run(capsys, "train", *step)
        assert code == 0, err
    asked = ("--prompt", "def", "--max-new-tokens", 9, "--ignore-eos", "--json", "--trace")
    code, out, _ = run(capsys, "generate", "--model", model, *asked)
    assert code == 0
    assert len(json.loads(out.splitlines()[0])["trace"][0]["drafts"]) == 7
    assert len((drafter / "metrics.jsonl").read_text().splitlines()) == 3
    # the same command again finds nothing left to do; another setting is refused
    assert run(capsys, "train", *steps[0])[0] == 0
    code, _, err = run(capsys, "train", *steps[0], "--learning-rate", 1)
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
