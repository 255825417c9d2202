"""Writes `tree.md`: a line for every file, which is the first sentence of its docstring.

python docs/tree.py
"""

import ast
import re
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("mimo_jax", "pallas_kernels", "sharding", "serve")
GENERATED = re.compile(r"_pb2(_grpc)?\.py$")


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{path}: expected a docstring that says what the file is for")
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.;])\s(?=[A-Z])", first)[0].replace("|", "\\|")


def tree(root: Path = ROOT) -> str:
    """The page."""
    lines = [
        "# Every file",
        "",
        "Written by `docs/tree.py` from the files' docstrings; `make docs` writes it again.",
        "",
    ]
    paths = sorted(p for folder in FOLDERS for p in (root / folder).rglob("*.py") if not GENERATED.search(p.name))
    for folder, files in groupby(sorted(paths, key=lambda p: (p.parent, p.name)), key=lambda p: p.parent):
        lines += [f"## `{folder.relative_to(root).as_posix()}/`", "", "| file | what it is for |", "|---|---|"]
        for path in files:
            name = "(the folder)" if path.name == "__init__.py" else f"`{path.name}`"
            lines.append(f"| {name} | {sentence(path)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(tree(), encoding="utf-8")
