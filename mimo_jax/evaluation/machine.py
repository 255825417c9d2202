"""What figures were measured on, and when."""

import os
import platform
from datetime import date
from pathlib import Path

import jax


def this_machine() -> dict[str, str]:
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
