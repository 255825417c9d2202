"""How a model is spread over devices: the numbers a person gives, the mesh they make, and what each axis cuts.

The mesh is `data` x `tensor`. Attention is cut by heads over `tensor`, and its sequences over `data`. Experts lie over
both axes: whole ones, slices of every one, or slices over one axis and whole ones over the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.collectives import Cut

MeshAxes = str | tuple[str, ...] | None
"""Mesh axes that a dimension is cut over; None: every device has all of it."""


class TopologyError(ValueError):
    """Numbers that do not fit each other, the devices or the model."""


@dataclass(frozen=True)
class Topology:
    """Parallel sizes, in the words of serving engines: `tensor_parallel` counts all devices.

    Raises:
        TopologyError: The numbers cannot work together.
    """

    tensor_parallel: int = 1
    """Devices in all."""
    data_parallel: int = 1
    """Groups that attention splits sequences over; more than 1 needs `dp_attention`."""
    expert_parallel: int = 1
    """Parts that the set of experts falls into; the devices left over slice every expert."""
    dp_attention: bool = False
    """Attention runs once in every data-parallel group, over tensor_parallel / data_parallel devices."""
    dp_lm_head: bool = False
    """The vocabulary is cut within a data-parallel group, rather than over all devices."""
    dense_tensor_parallel: int | None = None
    """1: every device holds whole dense MLPs; default: they are cut as attention is."""

    def __post_init__(self) -> None:
        tensor, data, expert = self.tensor_parallel, self.data_parallel, self.expert_parallel
        for name in ("tensor_parallel", "data_parallel", "expert_parallel", "dense_tensor_parallel"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise TopologyError(f"{name} must be at least 1, not {size}")
        if data > 1 and not self.dp_attention:
            raise TopologyError(
                f"data_parallel {data} without DP attention means {data} copies of the model: run {data} servers, or "
                f"enable DP attention"
            )
        if tensor % data:
            raise TopologyError(
                f"{tensor} devices (tensor_parallel) do not split into {data} data-parallel groups of one size"
            )
        if expert not in (widths := (1, data, self.attention_tensor, tensor)):
            known = ", ".join(map(str, sorted(set(widths))))
            raise TopologyError(
                f"expert_parallel {expert} is no part of a mesh of data={data} x tensor={self.attention_tensor}; "
                f"it may be {known}"
            )
        if self.dp_lm_head and not self.dp_attention:
            raise TopologyError("a DP LM head needs DP attention")
        if self.dense_tensor_parallel not in (None, 1, self.attention_tensor):
            raise TopologyError(
                f"dense_tensor_parallel {self.dense_tensor_parallel} is neither 1 (whole dense MLPs on every device) "
                f"nor {self.attention_tensor} (cut as attention is)"
            )

    @property
    def attention_tensor(self) -> int:
        """Devices that attention's heads are cut over: the mesh's `tensor` axis."""
        return self.tensor_parallel // self.data_parallel

    @property
    def axes(self) -> dict[str, int]:
        """The mesh: names of its axes and their sizes, outermost first."""
        return {"data": self.data_parallel, "tensor": self.attention_tensor}

    @property
    def rules(self) -> Mapping[str, MeshAxes]:
        """The table from the logical axes that arrays name to the mesh axes that cut them."""
        expert, inner = self._expert_axes()
        return {
            "batch": "data",
            # in training, where groups have parts of the same sequences
            "sequence": "data",
            "pages": "data",
            "layers": None,
            # over the groups last: a range of ids that several groups share is one range (`Cut.swap_rows`)
            "vocab": "tensor" if self.dp_lm_head else ("tensor", "data"),
            "logits": "tensor",
            "embed": None,
            # of what an optimiser keeps, where the parameter has all of `embed` everywhere
            "moments": "data",
            "features": None,
            "heads": "tensor",
            "kv_heads": "tensor",
            "head_dim": None,
            "mlp": None if self.dense_tensor_parallel == 1 else "tensor",
            "choices": None,
            "draft_mlp": "tensor",
            "expert": expert,
            "gate_up": None,
            "expert_inner": inner,
        }

    def _expert_axes(self) -> tuple[MeshAxes, MeshAxes]:
        """Axes of whole experts and of slices."""
        both, parts = ("data", "tensor"), self.expert_parallel
        if parts == self.tensor_parallel:
            return both, None
        if parts == 1:
            return None, both
        return ("data", "tensor") if parts == self.data_parallel else ("tensor", "data")

    def width(self, logical: str) -> int:
        """Pieces that a logical axis is cut into."""
        return prod(self.axes[axis] for axis in self._cut_over(logical))

    def part(self, logical: str, whole: int, **place: int) -> tuple[int, int]:
        """The half-open range of a dimension of size `whole` that a device has.

        Args:
            logical: The dimension's name.
            whole: Its size, which divides by `width`.
            place: Where in the mesh the device stands, by axis.
        """
        index = 0
        for axis in self._cut_over(logical):
            index = index * self.axes[axis] + place[axis]
        size = whole // self.width(logical)
        return index * size, (index + 1) * size

    def cut(self, *logical: str) -> Cut:
        """What devices exchange that hold parts along some logical axes."""
        over = {axis for name in logical for axis in self._cut_over(name) if self.axes[axis] > 1}
        # of one dimension in its own order, of several in the mesh's: only sums are taken over those
        order = self._cut_over(logical[0]) if len(logical) == 1 else tuple(self.axes)
        axes = tuple(axis for axis in order if axis in over)
        return Cut(axes, tuple(self.axes[axis] for axis in axes))

    def _cut_over(self, logical: str) -> tuple[str, ...]:
        axes = self.rules[logical]
        return (axes,) if isinstance(axes, str) else axes or ()

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh, row by row from `devices` (default: this process's view of all devices).

        Raises:
            TopologyError: There are fewer devices than it needs, or several processes with more.
        """
        devices = jax.devices() if devices is None else list(devices)
        names, sizes = tuple(self.axes), tuple(self.axes.values())
        if self.tensor_parallel > len(devices):
            raise TopologyError(
                f"a mesh of data={sizes[0]} x tensor={sizes[1]} needs {self.tensor_parallel} devices, "
                f"found {len(devices)}"
            )
        if jax.process_count() > 1 and self.tensor_parallel < len(devices):
            raise TopologyError(
                f"{jax.process_count()} processes have {len(devices)} devices in all, and tensor_parallel is "
                f"{self.tensor_parallel}: it must be {len(devices)}, so that every process takes part"
            )
        grid = np.array(devices[: self.tensor_parallel]).reshape(sizes)
        return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))

    def spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """How an array whose dimensions have these logical names and sizes is cut; without a name, not at all.

        Raises:
            KeyError: A name that `rules` does not have.
            TopologyError: A dimension cannot be cut into equal parts.
        """
        for axis, size in zip(axes, shape, strict=True):
            if axis is not None and size % self.width(axis):
                raise TopologyError(f"{axis} of size {size} cannot be cut into {self.width(axis)} equal parts")
        return PartitionSpec(*(None if axis is None else self.rules[axis] for axis in axes))

    def sharding(self, mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """Where such an array lies on a mesh; raises as `spec`."""
        return NamedSharding(mesh, self.spec(axes, shape))
