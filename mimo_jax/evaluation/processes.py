"""Modules run in processes of their own, which see as many devices of a CPU as they are to."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def with_devices(devices: int, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """What a module prints, as JSON, when it is run with so many devices.

    Args:
        devices: Of a CPU; they share the machine's cores.
        module: Its name.
        arguments: Of its command line.
        environment: Variables beside this process's own.

    Raises:
        RuntimeError: It failed.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | (environment or {}) | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}, run with {devices} devices, ended with {done.returncode}")
    return json.loads(done.stdout)
