"""Python's own library as text: every documented class and function of its pure modules is a document."""

import ast
import os
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from mimo_jax.training.corpus import Document, is_reserved

SMALLEST, LARGEST = 200, 6000
"""Characters of a document."""

# Tests and demonstrations repeat themselves, tables teach nothing, and what is installed beside it is not the library.
_SKIPPED = frozenset(
    (
        "__pycache__", "_bundled", "dist-packages", "encodings", "idlelib", "idle_test", "lib-dynload", "lib2to3",
        "pydoc_data", "site-packages", "test", "tests", "turtledemo",
    )
)  # fmt: skip


def modules(root: Path | None = None) -> tuple[Path, ...]:
    """The library's modules in a fixed order; none where there are no sources.

    Args:
        root: The library's folder; this Python's without it.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED and not name.startswith("config-")]
        found += [
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def documents(root: Path | None = None) -> Iterator[Document]:
    """All documents in a fixed order, the reserved ones too."""
    for module in modules(root):
        yield from (Document("code", text=text) for text in module_texts(module))


def generate(rng: random.Random, reserved: bool = False) -> Document | None:
    """One document drawn at random; None where the library's sources are absent.

    Args:
        rng: Decides which.
        reserved: Draw from those kept for evaluation, instead of the others.
    """
    paths, ends = _modules_by_size()
    for _ in range(200 if paths else 0):  # some modules document nothing, and few documents of a module are reserved
        path = rng.choices(paths, cum_weights=ends)[0]
        found = [Document("code", text=text) for text in module_texts(path)]
        found = [document for document in found if is_reserved(document) == reserved]
        if found:
            return rng.choice(found)
    return None


@lru_cache(maxsize=2048)
def module_texts(path: Path) -> tuple[str, ...]:
    """The documents of one module: classes and functions with a docstring; of larger classes, their methods."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings
            tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return ()
    return tuple(_cut(tree, source.splitlines()))


def _cut(tree: ast.Module | ast.ClassDef, lines: list[str]) -> Iterator[str]:
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        text = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]) + "\n").replace("\f", "")
        if len(text) > LARGEST and isinstance(node, ast.ClassDef):
            yield from _cut(node, lines)
        elif SMALLEST <= len(text) <= LARGEST and ast.get_docstring(node) and _stands_alone(text):
            yield text


def _stands_alone(text: str) -> bool:
    """False for a method that lost its place, as when a string of it reaches back to the first column."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return text.isascii()


@lru_cache(maxsize=1)
def _modules_by_size() -> tuple[tuple[Path, ...], tuple[int, ...]]:
    """Modules and the running sum of their sizes: drawing by size comes close to drawing documents evenly."""
    paths = modules()
    return paths, tuple(accumulate(path.stat().st_size for path in paths))
