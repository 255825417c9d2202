"""Compiled programs, kept between runs."""

import os
from pathlib import Path

import jax


def keep_programs(platform: str) -> None:
    """Keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where or it is empty.

    Not on a CPU: XLA:CPU has crashed on reading its own executables back, and they take seconds to make anew.

    Args:
        platform: What JAX computes on.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and platform != "cpu":
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "mimo-jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
