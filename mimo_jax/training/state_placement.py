"""Where lies what a step of training changes: parameters as in decoding, the optimiser's state in smaller parts.

The optimiser works on whole arrays, wherever their parts are: XLA moves what a matrix as a whole needs, such as Muon's
products of one with itself. What it computes is what one device would.
"""

from typing import Any

import jax
import optax

from mimo_jax.params import Declared, Params
from mimo_jax.training.groups import Groups
from mimo_jax.training.optimizers import TrainState
from sharding.topology import Topology


def as_declared(params: Params, declared: Declared[Any]) -> Params:
    """Parameters in the dtypes that a module computes with."""
    return jax.tree.map(lambda x, shape: x.astype(shape.dtype), params, declared.shapes)


def start(optimizer: optax.GradientTransformation, params: Params, axes: Params, groups: Groups) -> TrainState:
    """The state before the first step, on the mesh.

    Args:
        optimizer: Of these parameters.
        params: Whole, float32.
        axes: The logical axes of each (`Declared.axes`).
        groups: Of the mesh.
    """
    placed = groups.placed(params, axes)
    lie = groups.shardings(moments(jax.eval_shape(optimizer.init, placed), axes, groups.topology))
    return TrainState(placed, jax.jit(optimizer.init, out_shardings=lie)(placed))


def kept_in_place(state: TrainState, axes: Params, groups: Groups) -> TrainState:
    """Within a program, the state as it lies before every step; arguments as those of `start`."""
    lie = TrainState(groups.specs(state.params, axes), moments(state.optimizer, axes, groups.topology))
    return jax.lax.with_sharding_constraint(state, groups.shardings(lie))


def moments(state: Any, axes: Params, topology: Topology) -> Any:
    """How an optimiser's state lies: what it keeps of a parameter as that parameter, cut over the groups, too."""
    named = {_names(path): names for path, names in jax.tree.leaves_with_path(axes, is_leaf=_is_axes)}

    def leaf(path: tuple, value: Any) -> jax.P:
        names = named.get(_names(path))
        return jax.P() if names is None else _spec(names, value.shape, topology)

    return jax.tree_util.tree_map_with_path(leaf, state)


def _spec(names: tuple[str, ...], shape: tuple[int, ...], topology: Topology) -> jax.P:
    """How what an optimiser keeps of a parameter lies, given the parameter's logical axes and shape."""
    cut = tuple("moments" if name == "embed" else name for name in names)
    divides = not any(size % topology.width(name) for name, size in zip(cut, shape, strict=True))
    axes = [axis for name in cut for axis in topology.cut(name).axes]
    # an axis of the mesh cuts one dimension only
    once = topology.width("moments") > 1 and len(axes) == len(set(axes))
    return topology.spec(cut if once and divides else names, shape)


def _names(path: tuple) -> tuple[str, ...]:
    """The last names of a path, which are the parameter's: what an optimiser puts around them has no keys."""
    names: list[str] = []
    for key in reversed(path):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        names.insert(0, key.key)
    return tuple(names)


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple)
