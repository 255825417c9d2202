"""What the pages say can be done, can be done: commands, their output, links, the list of files, the picture."""

import argparse
import doctest
import importlib
import json
import re
import runpy
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from smg.router_args import RouterArgs

from mimo_jax import Generator, cli
from mimo_jax.devices import known_devices
from mimo_jax.presets import NANO
from serve import launch_server
from serve.flags import parse, parser
from tests.conftest import REPOSITORY
from tests.pages import PAGES, Command, anchors, blocks, commands, links, text_of
from tests.serving.config_folders import write_configurations

COMMANDS = [command for page in PAGES for command in commands(page)]
README, TESTING, TREE = REPOSITORY / "README.md", REPOSITORY / "docs" / "testing.md", REPOSITORY / "docs" / "tree.md"
CLIENTS = ("chat", "bench", "overhead")
OTHERS = {  # options of other people's programs that a command of ours has in it, or a page names
    "--dist",
    "--gpus",
    "--shm-size",
    "--devices",
    "--xla_gpu_enable_latency_hiding_scheduler",
    "--xla_force_host_platform_device_count",
    "--ntasks-per-node",
}

of_ours = pytest.mark.parametrize("command", [c for c in COMMANDS if c.program.startswith(("mimo", "python"))], ids=str)


# --- how each is checked, as docs/testing.md says


@cache
def ways() -> dict[tuple[str, ...], str]:
    """From the beginning of a command to how it is checked: the table in docs/testing.md."""
    table = text_of(TESTING).split("## Commands on these pages")[1]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", table, re.MULTILINE)
    return {tuple(command.split()): how for command, how in rows}


def way(command: Command) -> str:
    """The longest row that fits; "" where there is none."""
    words = tuple(command.text.split())
    return ways().get(max((b for b in ways() if words[: len(b)] == b), key=len, default=()), "")


def test_the_pages_have_commands():
    assert len(COMMANDS) > 100
    assert sum(c.whole for c in COMMANDS) > 50
    assert {c.page for c in COMMANDS} > {README, TESTING, REPOSITORY / "CONTRIBUTING.md"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.whole], ids=str)
def test_every_command_is_checked_as_the_table_says(command):
    how = way(command)
    assert how, "docs/testing.md does not say how such commands are checked"
    if not how.startswith("`tests/"):
        return
    suite = (REPOSITORY / how.strip("`")).read_text(encoding="utf-8")
    if command.program in ("mimo-jax", "mimo-serve"):
        for word in (w for w in command.words[:2] if re.fullmatch(r"[a-z][a-z-]+", w)):
            assert word in suite, f"{how} does not run {word}"


def test_the_table_has_no_row_for_nothing():
    elsewhere = [tuple(c.text.split()) for c in COMMANDS if c.page != TESTING]
    assert {b for b in ways() if any(words[: len(b)] == b for words in elsewhere)} == set(ways())


# --- arguments


def subparsers(made: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {
        name: sub for a in made._actions if isinstance(a, argparse._SubParsersAction) for name, sub in a.choices.items()
    }


def descend(made: argparse.ArgumentParser, words: tuple[str, ...]) -> argparse.ArgumentParser:
    """The parser of the subcommand that words name; placeholders (`COMMAND`) name none."""
    for word in words:
        choices = subparsers(made)
        if not choices or word.startswith("-") or word.isupper():
            break
        assert word in choices, f"there is no {word}, only {', '.join(choices)}"
        made = choices[word]
    return made


def known_options(command: Command) -> set[str]:
    """Options of the program, or of its subcommand."""
    words = command.words
    if command.program == "mimo-jax":
        return set(descend(cli._parser(), words)._option_string_actions)
    if command.program == "python -m pallas_kernels.bench":
        source = (REPOSITORY / "pallas_kernels" / "bench" / "__main__.py").read_text(encoding="utf-8")
        return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
    if words[:1] and words[0] in CLIENTS:
        own = set(descend(importlib.import_module(f"serve.{words[0]}")._parser(), words[1:])._option_string_actions)
        return own | set(parser("mimo-serve")._option_string_actions) if words[:2] == ("overhead", "offline") else own
    return set(parser("mimo-serve")._option_string_actions)


@of_ours
def test_options_exist(command):
    given = {word.partition("=")[0] for word in command.words if word.startswith("--")}
    unknown = given - known_options(command) - {"--help"}
    if command.program.endswith("serve.launch_server"):
        parse(sorted(unknown))  # those of SGLang's that have no effect here
    else:
        assert unknown == set()


def filled(command: Command, values: dict[str, str]) -> list[str]:
    """Its words, with something in the place of `DIR` and the like."""
    return [re.sub(r"\$RANK|\b[A-Z]{3,}\b", lambda m: values.get(m[0], m[0]), word) for word in command.words]


PLACES = {"DIR": "model", "FILE": "ids.json", "OUT": "out", "HOST": "localhost", "$RANK": "0", "NAME": "tiny"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.whole and c.program == "mimo-jax"], ids=str)
def test_arguments_are_whole(command, capsys):
    try:
        cli._parser().parse_args(filled(command, PLACES))
    except SystemExit:
        pytest.fail(capsys.readouterr().err)


def test_options_that_pages_name_exist():
    known = set(OTHERS)
    for made in (cli._parser(), *(importlib.import_module(f"serve.{name}")._parser() for name in CLIENTS)):
        known |= all_options(made)
    known |= set(parser("mimo-serve")._option_string_actions)
    for page in PAGES:
        if page == TREE:
            continue
        prose = re.sub(r"^(```.*?^```$)", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
        alone = re.findall(r"`(--[a-z][\w-]+)", prose)
        assert set(alone) - known == set(), page


def all_options(made: argparse.ArgumentParser) -> set[str]:
    return set(made._option_string_actions).union(*map(all_options, subparsers(made).values()))


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.program.startswith(("mimo", "python"))], ids=str)
def test_other_programs_are_given_what_exists(command):
    words = command.words
    if command.program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
        assert {w for w in words if "=" not in w} <= targets
    elif command.program == "pip":
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert extra in project["optional-dependencies"]
    elif command.program == "smg":
        made = argparse.ArgumentParser()
        RouterArgs.add_cli_args(made)
        made.parse_args(words[1:])
    else:
        for word in words:
            assert "/" not in word or (REPOSITORY / word).exists(), word


# --- servers


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_configurations(tmp_path_factory.mktemp("models") / "release", "mimo-v2.5-pro")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.whole and way(c) == "`--dry-run`"], ids=str)
def test_servers_would_start(command, release, capsys):
    words = filled(command, PLACES | {"DIR": str(release)})
    assert launch_server.main([*words, "--dry-run"]) == 0, capsys.readouterr().err
    resolved = json.loads(capsys.readouterr().out)
    size = re.search(r"--(?:tensor-parallel-size|tp-size) (\d+)", command.text)
    assert resolved["tp_size"] == (int(size[1]) if size else 1)


# --- links, the list of files, the picture


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (str(cited["version"]), cited["license"]) == (project["version"], project["license"])
    for one in cited["references"]:
        assert one["title"]
        assert one["authors"]
        assert one["url"].startswith("https://")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_pages_name_files_that_exist():
    folders = "mimo_jax|pallas_kernels|sharding|serve|tests|docs|notebooks"
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", text_of(page)):
            assert (REPOSITORY / name).exists(), f"{page}: {name}"


def test_every_page_is_reached_from_the_readme():
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        targets = ((page.parent / link.partition("#")[0]).resolve() for link in links(page) if link[0] != "#")
        waiting += [t for t in targets if t in PAGES and t not in seen]
    assert set(PAGES) - seen == {REPOSITORY / "CHANGELOG.md"}


def test_the_list_of_files_is_in_step():
    assert text_of(TREE) == runpy.run_path(str(TREE.with_suffix(".py")))["tree"](), "run `make docs`"


def test_the_readme_names_every_folder():
    named = set(re.findall(r"`([\w/]+)/`", text_of(README).split("## The tree")[1]))
    packages = {
        p.parent for f in ("mimo_jax", "serve", "sharding", "pallas_kernels") for p in REPOSITORY.glob(f"{f}/*.py")
    }
    packages |= {p.parent for f in ("mimo_jax", "serve") for p in REPOSITORY.glob(f"{f}/*/*") if p.is_file()}
    packages = {p.relative_to(REPOSITORY).as_posix() for p in packages if p.name != "__pycache__"}
    assert packages <= named
    assert all((REPOSITORY / name).is_dir() for name in named)


def comments(picture: Path) -> list[str]:
    """Texts of a picture, which matplotlib repeats in comments beside their outlines."""
    return re.findall(r"<!-- (.+?) -->", picture.read_text(encoding="utf-8"))


def test_the_picture_is_small_and_of_the_answer_that_is_shown():
    picture = REPOSITORY / "docs" / "pictures" / "rounds.svg"
    assert picture.stat().st_size < 200_000
    (shown,) = (c.shown for c in commands(README) if c.shown and "--ask" in c.words)
    rounds, length = re.findall(r"(\d+) rounds, accepted length ([\d.]+)", shown)[0]
    assert any(f"in {rounds} passes of the backbone, accepted length {length}" in c for c in comments(picture))


# --- running them


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the pages' commands name."""
    folder = tmp_path_factory.mktemp("pages")
    chat = json.dumps(
        [{"role": "user", "content": "What is the capital of France?"}]
    )  # as long as another: one program
    for name in ("messages.json", "prompts.jsonl"):
        (folder / name).write_text(chat)
    device = {k: v for k, v in vars(known_devices()["H200"]).items() if k != "name"}
    (folder / "devices.json").write_text(json.dumps({"MINE": device}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_model() -> Iterator[None]:
    """Load the model in the package once: commands share its programs."""
    load = cache(lambda folder: Generator_load(folder, progress=False))
    Generator_load = Generator.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "load", lambda folder=NANO, **options: load(Path(folder)))
        yield


TIME = re.compile(r"[\d.]+(?= tokens/s,)|(?<= in )[\d.]+(?= s)|(?<=compile )[\d.]+(?= s)")


def same_output(shown: str, printed: str) -> bool:
    """Whether a page shows what a command printed; `...` stands for lines left out, and times may differ."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(TIME.sub("_", shown), TIME.sub("_", printed), flags)


def test_another_output_is_noticed():
    assert same_output("a 3\n...\nz, compile 2.5 s", "a 3\nb\nz, compile 7 s\n")
    assert not same_output("a 3\n...\nz", "a 4\nb\nz")
    assert not same_output("11 rounds", "12 rounds")


def runs_here(command: Command) -> bool:
    """Not where it wants several nodes or devices."""
    many = {"--nnodes", "--node-rank"} & set(command.words) or "--tp-size" in command.words
    return not (many and command.words[0] == "generate")


RUN = [c for c in COMMANDS if c.whole and way(c) == "running them" and runs_here(c)]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=str)
def test_runs(command, place, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    written = "synthesize" in command.words
    words = filled(command, PLACES | {"DIR": str(tmp_path / "new" if written else NANO)})
    assert cli.main(words) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    if command.shown is not None:
        assert same_output(command.shown, out + err)


@pytest.mark.slow
def test_chat_and_python_give_the_answer_of_generate(capsys):
    (asked,) = (c for c in commands(README) if c.shown and "--ask" in c.words)
    (chat,) = (c for c in commands(README) if c.shown and c.words[:1] == ("chat",))
    answer = Generator.load().chat([{"role": "user", "content": asked.words[-1]}])
    assert asked.shown
    assert chat.shown
    assert asked.shown.splitlines()[0] == answer.text
    assert chat.shown.splitlines()[0] == answer.text.removeprefix("<think></think>")
    (python,) = blocks(README, "python")
    exec(python, {})
    assert capsys.readouterr().out == f"{answer.text} {answer.stats.accepted_length}\n"


@pytest.mark.slow
def test_the_picture_is_what_its_script_draws(tmp_path):
    picture = REPOSITORY / "docs" / "pictures" / "rounds.svg"
    runpy.run_path(str(picture.with_suffix(".py")))["main"](tmp_path / "rounds.svg")
    assert comments(tmp_path / "rounds.svg") == comments(picture)
