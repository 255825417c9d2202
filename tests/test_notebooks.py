"""Notebooks run from top to bottom."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((REPOSITORY / "notebooks").glob("*.py")), ids=lambda p: p.stem)
def test_notebook_runs(notebook, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(notebook)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
