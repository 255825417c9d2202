"""One table from the logical axes that parameters name to the axes of the mesh."""

from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": None,
    "features": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": ("data", "tensor"),
    "gate_up": None,
    "expert_inner": None,
}


def named_sharding(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical names.

    Raises:
        KeyError: A name that the table does not have.
    """
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in axes)))
