"""What devices that hold parts of one dimension exchange, inside `jax.shard_map`.

A program for a mesh is written for one device: it sees its own parts, and says where it needs those of others.
"""

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

GROUPS = "data"
"""The mesh axis whose devices attend to different sequences. Along every other axis, rows are the same."""


@dataclass(frozen=True)
class Cut:
    """The mesh axes that cut a dimension, outermost first. Without any, nothing is ever exchanged."""

    axes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Parts of the dimension."""
        return prod(self.sizes)

    def index(self) -> jax.Array | int:
        """Which part this device has."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def local(self, places: jax.Array, size: int) -> jax.Array:
        """Places in the whole, counted from the first of this device's `size`; `size`, out of range, for others'."""
        at = places - self.index() * size
        return jnp.where((at >= 0) & (at < size), at, size)

    def sum(self, partial: jax.Array) -> jax.Array:
        """The sum over the parts, on every device."""
        return jax.lax.psum(partial, self.axes) if self.axes else partial

    def any(self, holds: jax.Array) -> jax.Array:
        """Whether a scalar holds on some device."""
        return jax.lax.pmax(holds.astype(jnp.int32), self.axes) > 0 if self.axes else holds

    def gather(self, part: jax.Array, axis: int) -> jax.Array:
        """The whole, from parts of a dimension."""
        return jax.lax.all_gather(part, self.axes, axis=axis % part.ndim, tiled=True) if self.axes else part

    def part(self, whole: jax.Array, axis: int) -> jax.Array:
        """This device's part of a dimension."""
        if not self.axes:
            return whole
        size = whole.shape[axis] // self.width
        return jax.lax.dynamic_slice_in_dim(whole, self.index() * size, size, axis % whole.ndim)

    def before(self, part: jax.Array, count: int, axis: int) -> jax.Array:
        """The last `count` positions of a dimension before those of this device, from its neighbours.

        Where the whole begins later than that, zeros stand for what is missing.
        """
        return self._beyond(part, count, axis, after=False)

    def after(self, part: jax.Array, count: int, axis: int) -> jax.Array:
        """The first `count` positions after those of this device, as `before`."""
        return self._beyond(part, count, axis, after=True)

    def _beyond(self, part: jax.Array, count: int, axis: int, after: bool) -> jax.Array:
        size, found = part.shape[axis], list[jax.Array]()  # from the nearest neighbour on
        for hops in range(1, min(self.width - 1, -(-count // size)) + 1):
            wanted = min(size, count - (hops - 1) * size)
            start = 0 if after else size - wanted
            send = jax.lax.slice_in_dim(part, start, start + wanted, axis=axis)
            ways = [(i + hops, i) if after else (i, i + hops) for i in range(self.width - hops)]
            found.append(jax.lax.ppermute(send, self.axes, ways))
        missing = count - sum(x.shape[axis] for x in found)
        found.append(jnp.zeros((*part.shape[:axis], missing, *part.shape[axis + 1 :]), part.dtype))
        return jnp.concatenate(found if after else found[::-1], axis)

    def take(self, part: jax.Array, places: jax.Array) -> jax.Array:
        """Elements [...] of the last dimension, at places [...] in the whole."""
        at = self.local(places, part.shape[-1])[..., None]
        return self.sum(jnp.take_along_axis(part, at, axis=-1, mode="fill", fill_value=0)[..., 0])

    def logsumexp(self, part: jax.Array) -> jax.Array:
        """Of the last dimension, in the whole: [...]. Of each part, two values are exchanged."""
        if not self.axes:
            return jax.nn.logsumexp(part, axis=-1)
        top = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(part), axis=-1), self.axes)
        return top + jnp.log(self.sum(jnp.sum(jnp.exp(part - top[..., None]), axis=-1)))

    def argmax(self, part: jax.Array) -> jax.Array:
        """Where the largest value of the last dimension stands, int32; the first of equal ones.

        Of each part, only its largest value and where it stands are exchanged.
        """
        size = part.shape[-1]
        best = jnp.max(part, axis=-1, keepdims=True)
        # two reductions of one value each are faster on a CPU than argmax, which reduces pairs; NaN gives the last
        place = jnp.where(part >= best, jnp.arange(size, dtype=jnp.int32), size - 1)
        at = jnp.min(place, axis=-1)
        if not self.axes:
            return at
        best = self.gather(best, -1)  # [..., parts]
        winner = jnp.argmax(best, axis=-1, keepdims=True)  # the lowest part of equal ones, which has the lowest ids
        places = self.gather((at + self.index() * size)[..., None], -1)
        return jnp.take_along_axis(places, winner, axis=-1)[..., 0]

    def gather_rows(self, rows: jax.Array) -> jax.Array:
        """Rows [n, ...] of all groups, where a group's devices do not have all parts: [groups * n, ...]."""
        return jax.lax.all_gather(rows, GROUPS, tiled=True) if GROUPS in self.axes else rows

    def sum_rows(self, partial: jax.Array) -> jax.Array:
        """Rows [n, ...] of this group, summed over the parts, from each device's share of `gather_rows`' rows."""
        if GROUPS in self.axes:
            partial = jax.lax.psum_scatter(partial, GROUPS, tiled=True)
        within = tuple(axis for axis in self.axes if axis != GROUPS)
        return jax.lax.psum(partial, within) if within else partial

    def swap_rows(self, rows: jax.Array) -> jax.Array:
        """From parts of the last dimension for `gather_rows`' rows to larger parts for this group's rows.

        The dimension is cut over the groups last, so that what stays is one range, cut over the other axes alone.
        """
        if GROUPS not in self.axes:
            return rows
        return jax.lax.all_to_all(rows, GROUPS, split_axis=0, concat_axis=rows.ndim - 1, tiled=True)
