"""Measurements as people and programs get them: under a line that says on what, and when, and as JSON."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from mimo_jax.arguments import output_file
from mimo_jax.progress import output_console, require_matplotlib


def check_outputs(results: Path | None, picture: Path | None = None) -> None:
    """Raise before the work begins if what was asked for cannot be written."""
    for path in (results, picture):
        if path is not None:
            output_file(path)
    if picture is not None:
        require_matplotlib()


def report(program: str, shown: Sequence[Table], results: dict[str, Any], more: str, out: Path | None) -> None:
    """Print tables under a line that says what they were measured on, and write the results of a program as JSON."""
    machine = _machine()
    console = output_console()
    console.print(", ".join([machine["device"], f"jax {machine['jax']}", machine["date"], more]))
    for table in shown:
        console.print(table)
    if out is not None:
        whole = {"machine": machine, "command": [program, *sys.argv[1:]], **results}
        out.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _machine() -> dict[str, str]:
    """Device, platform, version of JAX, and the date."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = f"{_processor()}, {os.cpu_count()} cores"
    return {"device": name, "platform": platform.platform(), "jax": jax.__version__, "date": str(date.today())}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
