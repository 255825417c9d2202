"""Where the arrays of a program's arguments lie: dataclasses name the logical axes of their fields."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, get_type_hints

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.topology import Topology


class Axes(tuple[str | None, ...]):
    """Logical names of an array's dimensions, for a field: `Annotated[jax.Array, Axes("batch", None)]`."""

    def __new__(cls, *names: str | None) -> "Axes":
        """From the names."""
        return super().__new__(cls, names)


BatchArray = Annotated[jax.Array, Axes("batch")]
"""An array with a value for each sequence of a batch."""


def layout(tree: Any, topology: Topology) -> Any:
    """The `PartitionSpec` of every array of a tree of dictionaries and of dataclasses whose fields name `Axes`.

    Arrays that lie on a mesh already stay as they are; others that nothing names are the same on every device.
    """
    if is_dataclass(tree):
        return type(tree)(
            **{
                name: layout(value, topology) if axes is None or value is None else topology.spec(axes, value.shape)
                for name, axes in _axes(type(tree)).items()
                for value in (getattr(tree, name),)
            }
        )
    if isinstance(tree, Mapping):
        return {name: layout(part, topology) for name, part in tree.items()}
    if isinstance(tree, (jax.Array, jax.ShapeDtypeStruct)) and isinstance(tree.sharding, NamedSharding):
        return tree.sharding.spec
    return jax.tree.map(lambda _: PartitionSpec(), tree)


@cache
def _axes(dataclass: type) -> dict[str, Axes | None]:
    """The axes of each field."""
    hints = get_type_hints(dataclass, include_extras=True)
    more = {f.name: getattr(hints[f.name], "__metadata__", ()) for f in fields(dataclass)}
    return {name: next((m for m in found if isinstance(m, Axes)), None) for name, found in more.items()}


def place(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Put arrays that every process has whole where `specs` say."""

    def put(x: jax.Array | np.ndarray, spec: PartitionSpec) -> jax.Array:
        sharding, whole = NamedSharding(mesh, spec), np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, specs)
