"""The project's pages: commands in them, what is shown beside them, and links."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.conftest import REPOSITORY

PAGES = (
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "serve" / "deploy").glob("*.md")),
    REPOSITORY / "notebooks" / "README.md",
    REPOSITORY / "mimo_jax" / "nano" / "README.md",
)
PROGRAMS = (
    "python -m serve.launch_server",
    "python -m pallas_kernels.bench",
    *(".ci/run", "docker", "kubectl", "make", "mimo-jax", "mimo-serve", "pip", "sbatch", "smg"),
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: Path
    program: str
    words: tuple[str, ...]
    """What follows the program; `...`, which stands for more, is left out."""
    whole: bool
    """Whether it does something as it is: it stands in a block, or has arguments, and nothing is left out."""
    shown: str | None = None
    """What the page says it prints, where it does."""

    @property
    def text(self) -> str:
        """On one line."""
        return shlex.join((*self.program.split(), *self.words))

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}: {self.text}"


@cache
def text_of(page: Path) -> str:
    """A page's text."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    """Blocks of code in these languages."""
    return [body for language, body in _BLOCK.findall(text_of(page)) if language in languages]


def commands(page: Path) -> list[Command]:
    """All commands of a page, in blocks and in the middle of a sentence.

    Raises:
        ValueError: A block has a line that begins with no program known here.
    """
    found = []
    for body in blocks(page, "sh", "bash", "console"):
        lines = body.replace("\\\n", " ").splitlines()
        prompted = any(line.startswith("$ ") for line in lines)
        for i, line in enumerate(lines):
            if prompted and not line.startswith("$ "):
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if not words:
                continue
            after = lines[i + 1 :]
            end = next((j for j, other in enumerate(after) if other.startswith("$ ")), len(after))
            command = _command(page, words, block=True, shown="\n".join(after[:end]) if prompted else None)
            if command is None:
                raise ValueError(f"{page}: begins with no program that tests/pages.py knows: {line}")
            found.append(command)
    for span in _INLINE.findall(_BLOCK.sub("", text_of(page))):
        try:
            words = shlex.split(" ".join(span.replace("\\|", "|").split()))
        except ValueError:  # code, with a quotation mark of its own
            continue
        command = _command(page, words, block=False, shown=None)
        if command is not None:
            found.append(command)
    return found


def _command(page: Path, words: list[str], *, block: bool, shown: str | None) -> Command | None:
    while words and _ASSIGNMENT.match(words[0]):
        words = words[1:]
    if words[:1] == ["python3"]:
        words = ["python", *words[1:]]
    for program in PROGRAMS:
        name = program.split()
        if words[: len(name)] == name:
            rest = words[len(name) :]
            partial = "..." in rest or "--help" in rest
            whole = not partial and (block or any(w.startswith("-") for w in rest) or "DIR" in rest)
            return Command(page, program, tuple(w for w in rest if w != "..."), whole, shown)
    return None


def links(page: Path) -> list[str]:
    """Targets of a page's links to other files and headings of the project."""
    targets = _LINK.findall(_BLOCK.sub("", text_of(page)))
    return [t for t in targets if not t.startswith(("http:", "https:", "mailto:"))]


def anchors(page: Path) -> set[str]:
    """What a link may name of a page's headings, as GitHub spells it."""
    headings = _HEADING.findall(_BLOCK.sub("", text_of(page)))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
