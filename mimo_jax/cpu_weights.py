"""How plain weights of a small model lie on a CPU: an array a layer, inputs before outputs.

XLA's CPU programs copy the row of a stack before they multiply with it, and read matrices [in, out] fastest. On
accelerators a row is read in place, and a stack of layers is one argument of a program instead of many.
"""

import jax
import jax.numpy as jnp

from mimo_jax.params import Params
from mimo_jax.quantization import ByLayer, Swapped, Weight


def by_layer(params: Params, axes: Params) -> Params:
    """Plain parameters of a module as above.

    Args:
        params: Of which each gives way to what is made of it, so that no two copies exist at a time.
        axes: The logical axes of each (see `Declared.axes`).
    """
    made: Params = {}
    for name, names in axes.items():
        value = params.pop(name)
        if isinstance(names, dict):
            made[name] = by_layer(value, names)
        elif names[0] == "layers":
            made[name] = ByLayer(tuple(_swapped(row) for row in value))
        else:
            made[name] = value if name == "embedding" else _swapped(value)  # of which rows are read
    return made


def _swapped(x: jax.Array) -> Weight:
    return x if x.ndim < 2 else Swapped(jnp.swapaxes(x, -1, -2))
