"""Notebooks: scripts and their stripped twins are in step, use public names alone, and run from top to bottom."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
CELL_SECONDS = 400
"""A quiet machine needs less than a minute for the longest; this is for one that has other work."""

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def test_every_script_has_its_notebook():
    assert [path.stem for path in SCRIPTS] == sorted(path.stem for path in FOLDER.glob("*.ipynb")) != []


@each
def test_in_step(script):
    written, stored = jupytext.read(script), nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    cells, twins = ([(cell.cell_type, cell.source) for cell in book.cells] for book in (written, stored))
    assert cells == twins, "run `make notebooks`"
    assert written.metadata.kernelspec == stored.metadata.kernelspec


@each
def test_stripped(script):
    for cell in nbformat.read(script.with_suffix(".ipynb"), as_version=4).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), "delete the .ipynb and run `make notebooks`"


def private_names(source: str) -> Iterator[str]:
    """Attributes, and names and modules imported, that begin with an underscore and are no `__dunder__`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name):
                names = [name]
            case ast.ImportFrom(module=module, names=aliases):
                names = [*(module or "").split("."), *(alias.name for alias in aliases)]
            case ast.Import(names=aliases):
                names = [part for alias in aliases for part in alias.name.split(".")]
            case _:
                continue
        yield from (name for name in names if name.startswith("_") and not name.endswith("__"))


@each
def test_public_names_alone(script):
    assert list(private_names(script.read_text(encoding="utf-8"))) == []


def test_private_names_are_found():
    source = "import jax._src.api\nfrom mimo_jax._b import _c, d\nx._e.__doc__\ny.f"
    assert sorted(private_names(source)) == ["_b", "_c", "_e", "_src"]


@pytest.mark.slow
@each
def test_runs(script, tmp_path):
    notebook = script.with_suffix(".ipynb")
    # of what the tests themselves compile with, quickly is right here, too, but not so many devices
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    command += ["--nbmake", f"--nbmake-timeout={CELL_SECONDS}", str(notebook)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
    assert "1 passed" in done.stdout
