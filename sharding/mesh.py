"""The device mesh: `data` x `tensor`."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh


def make_mesh(data: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data * tensor devices, row by row from `devices` (default: this process's view of all devices).

    Raises:
        ValueError: A size is below 1, or there are fewer devices than the mesh needs.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data < 1 or tensor < 1:
        raise ValueError(f"mesh sizes must be at least 1, not data={data}, tensor={tensor}")
    if data * tensor > len(devices):
        raise ValueError(f"a mesh of data={data} x tensor={tensor} needs {data * tensor} devices, found {len(devices)}")
    grid = np.array(devices[: data * tensor]).reshape(data, tensor)
    return Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
