"""How rows find their experts on a mesh, and their sums find back. No row is ever dropped; sums are in float32.

By sum: every device sees every row, runs the experts it has, and all add up. Few, large messages, whose size grows with
the rows times the devices: for decode. By exchange: a device sends a row to those devices alone that have one of its
experts. More messages, of fewer bytes: for prefill.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from sharding.collectives import GROUPS, Cut
from sharding.topology import Topology

ExpertMLP = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""x [rows, hidden], ids [rows, top_k] int32 and weights [rows, top_k] to [rows, hidden] float32, over the experts that
a device has, counted from 0; an id equal to their number is of an expert elsewhere and adds nothing."""

_MESSAGE_BYTES = 4e6
"""What a device sends in the time that starting one more collective takes: 10 us at 400 GB/s, an estimate."""
MORE_MESSAGES = 5
"""Collectives that an exchange has beyond a sum's, in a layer."""
_ROUTE_BYTES = 4  # an expert's id, or its weight

Way = Literal["sum", "exchange"]


def on_all_devices(
    x: jax.Array, ids: jax.Array, weights: jax.Array, experts: int, topology: Topology, mlp: ExpertMLP
) -> jax.Array:
    """Weighted sums of every row's experts, wherever these are.

    Args:
        x: [rows, hidden], of this device's group.
        ids: [rows, top_k] int32, each row's experts.
        weights: [rows, top_k] float32, their routing weights.
        experts: Their number, on all devices together.
        topology: Where experts lie.
        mlp: Runs those of this device.

    Returns:
        [rows, hidden] float32.
    """
    (rows, hidden), top_k = x.shape, ids.shape[1]
    way = {"sum": by_sum, "exchange": by_exchange}[chosen_way(topology, rows, hidden, top_k, x.dtype.itemsize)]
    return way(x, ids, weights, experts, topology, mlp)


@dataclass(frozen=True)
class Message:
    """Alike collectives of a layer, rows routed evenly."""

    what: str
    kind: Literal["all-gather", "all-to-all", "all-reduce", "reduce-scatter"]
    over: Cut
    count: int
    payload: float
    """Bytes of the whole array; of what one device has for all, itself included, where rows are exchanged."""

    @property
    def sent(self) -> float:
        """Bytes by one device for all of them: the least without reduction inside the network."""
        times = 2 if self.kind == "all-reduce" else 1
        return self.count * times * (self.over.width - 1) / self.over.width * self.payload


def chosen_way(topology: Topology, rows: int, hidden: int, top_k: int, itemsize: int) -> Way:
    """How `on_all_devices` goes; arguments as those of `messages`."""
    found = messages(topology, rows, hidden, top_k, itemsize)
    if "exchange" not in found:
        return "sum"
    sent = {way: sum(m.sent for m in all_of_it) for way, all_of_it in found.items()}
    return "sum" if sent["sum"] <= sent["exchange"] + MORE_MESSAGES * _MESSAGE_BYTES else "exchange"


def messages(topology: Topology, rows: int, hidden: int, top_k: int, itemsize: int) -> dict[Way, list[Message]]:
    """What a layer sends by sum and, where experts lie on several devices, by exchange (but for its few counts).

    Args:
        topology: Where experts lie.
        rows: Of each group.
        hidden: Their size.
        top_k: Experts a row.
        itemsize: Bytes of an element of a row on its way to the experts; on the way back it is a float32.
    """
    owners, slices, copies = _cuts(topology)
    row, route, sums = hidden * itemsize, top_k * _ROUTE_BYTES, hidden * 4

    def gathered(over: Cut) -> list[Message]:
        return [
            Message("rows", "all-gather", over, 1, over.width * rows * row),
            Message("ids and weights", "all-gather", over, 2, over.width * rows * route),
        ]

    def summed(holders: Cut) -> list[Message]:
        groups, within = _apart(holders)
        return [
            Message("sums", "reduce-scatter", groups, 1, groups.width * rows * sums),
            Message("sums", "all-reduce", within, 1, rows * sums),
        ]

    holders = topology.cut("expert", "expert_inner")
    found: dict[Way, list[Message]] = {"sum": [*gathered(_apart(holders)[0]), *summed(holders)]}
    if owners.width > 1:
        together, _ = _apart(slices)
        shared = together.width * rows
        # a row goes once to every device that has some of its experts
        sent = shared / copies.width * owners.width * (1 - (1 - 1 / owners.width) ** top_k)
        found["exchange"] = [
            *gathered(together),
            Message("rows", "all-to-all", owners, 1, sent * row),
            Message("ids and weights", "all-to-all", owners, 2, sent * route),
            Message("sums", "all-to-all", owners, 1, sent * sums),
            Message("sums", "all-gather", copies, 1, shared * sums),
            *summed(slices),
        ]
    return {way: [m for m in all_of_it if m.over.width > 1] for way, all_of_it in found.items()}


def _apart(cut: Cut) -> tuple[Cut, Cut]:
    """The groups among some axes, and the others."""
    pairs = list(zip(cut.axes, cut.sizes, strict=True))
    parts = ([p for p in pairs if p[0] == GROUPS], [p for p in pairs if p[0] != GROUPS])
    groups, others = (Cut(tuple(a for a, _ in part), tuple(s for _, s in part)) for part in parts)
    return groups, others


def by_sum(
    x: jax.Array, ids: jax.Array, weights: jax.Array, experts: int, topology: Topology, mlp: ExpertMLP
) -> jax.Array:
    """`on_all_devices` by sums over all devices that have experts or slices of them."""
    holders, owners = topology.cut("expert", "expert_inner"), topology.cut("expert")
    x, ids, weights = (holders.gather_rows(a) for a in (x, ids, weights))
    return holders.sum_rows(mlp(x, owners.local(ids, experts // owners.width), weights))


def by_exchange(
    x: jax.Array, ids: jax.Array, weights: jax.Array, experts: int, topology: Topology, mlp: ExpertMLP
) -> jax.Array:
    """`on_all_devices` by sending rows to the devices that have their experts."""
    owners, slices, copies = _cuts(topology)
    mine = experts // owners.width
    # devices that have slices of the same experts need the same rows
    x, ids, weights = (slices.gather_rows(a) for a in (x, ids, weights))
    rows = x.shape[0]
    # of the devices that have the same rows, each sends its share
    x, ids, weights = (_share(a, copies) for a in (x, ids, weights))

    wanted = jnp.any(ids[..., None] // mine == jnp.arange(owners.width), axis=1)  # [rows, devices]
    slot = jnp.cumsum(wanted.T.reshape(-1)).reshape(wanted.T.shape) - 1  # rows by device, then by number
    slots = wanted.shape[0] * min(ids.shape[1], owners.width)
    row = jnp.broadcast_to(jnp.arange(wanted.shape[0]), slot.shape)
    row = jnp.full(slots, wanted.shape[0]).at[jnp.where(wanted.T, slot, slots)].set(row, mode="drop")

    there, back = _routes(jnp.sum(wanted, axis=0, dtype=jnp.int32), owners)
    room = owners.width * wanted.shape[0]
    send = partial(_send, route=there, owners=owners, most=wanted.shape[0])
    x = send(x.at[row].get(mode="fill", fill_value=0), jnp.zeros((room, x.shape[1]), x.dtype))
    ids = send(ids.at[row].get(mode="fill", fill_value=experts), jnp.full((room, ids.shape[1]), experts, ids.dtype))
    weights = send(weights.at[row].get(mode="fill", fill_value=0), jnp.zeros((room, weights.shape[1]), weights.dtype))

    sums = mlp(x, owners.local(ids, mine), weights)
    sums = _send(sums, jnp.zeros((slots, sums.shape[1]), sums.dtype), route=back, owners=owners, most=wanted.shape[0])
    sums = jnp.zeros((wanted.shape[0], sums.shape[1]), sums.dtype).at[row].add(sums, mode="drop")
    return slices.sum_rows(copies.gather(sums, 0)[:rows])


def _cuts(topology: Topology) -> tuple[Cut, Cut, Cut]:
    """Devices with different experts, with other slices of the same, and with different experts but equal rows."""
    owners = topology.cut("expert")
    return owners, topology.cut("expert_inner"), _apart(owners)[1]


def _share(rows: jax.Array, copies: Cut) -> jax.Array:
    """This device's share of rows that several have; the last share is filled up with zeros."""
    missing = -rows.shape[0] % copies.width
    return copies.part(jnp.pad(rows, ((0, missing), (0, 0))), 0)


_Route = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""For every device, int32: the first row sent to it, their number, where they stand over there, how many come here."""


def _routes(sent: jax.Array, owners: Cut) -> tuple[_Route, _Route]:
    """The way there and the way back, for `sent` [devices] rows to every device."""

    def swapped(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, owners.axes, 0, 0, tiled=True)

    received = swapped(sent)
    first_sent, first_received = (jnp.cumsum(n) - n for n in (sent, received))
    there = first_sent, sent, swapped(first_received), received
    return there, (first_received, received, swapped(first_sent), sent)


def _send(rows: jax.Array, into: jax.Array, *, route: _Route, owners: Cut, most: int) -> jax.Array:
    """Send rows along a route into a buffer, at most `most` to each device."""

    def ragged(rows: jax.Array, into: jax.Array, *route: jax.Array) -> jax.Array:
        return jax.lax.ragged_all_to_all(rows, into, *route, axis_name=owners.axes)

    def equal(
        rows: jax.Array, into: jax.Array, first: jax.Array, _sent: jax.Array, _at: jax.Array, received: jax.Array
    ) -> jax.Array:
        number = jnp.arange(most, dtype=jnp.int32)
        out = rows.at[first[:, None] + number].get(mode="clip")  # [devices, most, ...]
        out = jax.lax.all_to_all(out, owners.axes, 0, 0)
        at = (jnp.cumsum(received) - received)[:, None] + number
        return into.at[jnp.where(number < received[:, None], at, into.shape[0])].set(out, mode="drop")

    # XLA's CPU backend has no ragged exchange
    return jax.lax.platform_dependent(rows, into, *route, cpu=equal, default=ragged)
