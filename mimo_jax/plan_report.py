"""A plan as plain values, as tables and as a picture; the tables show what the values hold."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from mimo_jax.floors import LATENCY, Floor, floor
from mimo_jax.plan import Plan, default_topology
from mimo_jax.progress import drawing
from sharding.topology import Topology, TopologyError

BATCHES = tuple(1 << i for i in range(9))
SCALES = (8, 16, 32, 64)
_NEARLY = 1.05


def describe(plan: Plan, accepted_length: float) -> dict[str, Any]:
    """All that a plan tells, as plain values; bytes and FLOPs are one device's, times are seconds.

    Args:
        plan: The plan.
        accepted_length: Tokens a round gives a sequence, the backbone's own included.

    Raises:
        ValueError: More are accepted than verified, or fewer than one.
    """
    if not 1 <= accepted_length <= plan.verify_length:
        raise ValueError(
            f"an accepted length counts the backbone's own token: it lies between 1 and the verify length, "
            f"{plan.verify_length}, and is not {accepted_length:g}"
        )
    memory, least = plan.memory(), floor(plan)
    whole: dict[str, int] = {}
    for weight in plan.model.weights:
        whole[weight.component] = whole.get(weight.component, 0) + weight.nbytes()
    backbone = [w for w in plan.model.weights if w.component != "drafter"]
    return {
        "device": asdict(plan.device),
        "topology": {**asdict(plan.topology), "mesh": plan.topology.axes},
        "load": {"batch": plan.batch, "context": plan.context, "verify_length": plan.verify_length},
        "parameters": sum(w.parameters() for w in backbone),
        "whole_model_bytes": whole,
        "memory": {
            "weights": memory.weights,
            "drafter": memory.drafter,
            "caches": memory.caches,
            "workspace_estimate": memory.workspace,
            "used": memory.used,
            "free": memory.free,
            "capacity": memory.capacity,
        },
        "fits": memory.free >= 0,
        "longest_context": plan.longest_context(),
        "largest_batch": plan.largest_batch(),
        "round": {
            "experts": plan.model.config.moe.experts,
            "experts_reached": least.experts_reached,
            "experts_held": plan.model.config.moe.experts // plan.topology.width("expert"),
            "experts_of_slowest_device": least.experts_of_slowest,
            "bytes_read": least.bytes_read,
            "flops": least.flops,
            "collectives": [asdict(c) for c in least.collectives],
            "bandwidth_seconds": least.bandwidth_seconds,
            "flops_seconds": least.flops_seconds,
            "interconnect_seconds": least.interconnect_seconds,
            "floor_seconds": least.seconds,
            "bound": least.bound,
        },
        "accepted_length": accepted_length,
        "tokens_per_second_per_sequence_at_most": accepted_length / least.seconds,
        "tokens_per_second_at_most": plan.batch * accepted_length / least.seconds,
    }


def topology_words(topology: Topology) -> str:
    """A topology in the words of its options."""
    words = [f"TP {topology.tensor_parallel}", f"EP {topology.expert_parallel}"]
    if topology.data_parallel > 1:
        words.append(f"DP {topology.data_parallel}")
    if topology.dp_attention:
        words.append("DP attention")
    if topology.dp_lm_head:
        words.append("DP LM head")
    if topology.dense_tensor_parallel is not None:
        words.append(f"dense-MLP TP {topology.dense_tensor_parallel}")
    return ", ".join(words)


def report(plan: Plan, described: dict[str, Any], console: Console, title: str) -> None:
    """Print a plan for people.

    Args:
        plan: The plan.
        described: What `describe` says of it.
        console: Where to.
        title: What is planned.
    """

    def say(text: str = "") -> None:
        console.print(text, highlight=False, soft_wrap=True)

    load = described["load"]
    say(f"[bold]{title}[/]")
    say(f"batch {load['batch']}, context {load['context']:,}, verify length {load['verify_length']}")
    say()
    console.print(_memory_table(described))
    say()
    say(f"longest context at batch {load['batch']}: {_found(described['longest_context'], plan)}")
    say(f"largest batch at context {load['context']:,}: {described['largest_batch']:,}")
    say()
    console.print(_round_table(described))
    say()
    console.print(_collectives_table(described))
    count = sum(c["count"] for c in described["round"]["collectives"])
    if count:
        listed = sum(c["seconds"] for c in described["round"]["collectives"])
        if (saved := listed - described["round"]["interconnect_seconds"]) > 5e-7:
            say(f"rows and experts could meet in {_ms(saved)} ms less by more collectives; the floor counts that")
        late = f"at {LATENCY * 1e6:g} µs each {_ms(count * LATENCY)} ms"
        say(f"{count} collectives a round, whose latency is not in the floor: {late}")
    say()
    say(
        f"floor of a round {_ms(described['round']['floor_seconds'])} ms if routing is even, by "
        f"{described['round']['bound']}: an upper bound on speed, not a forecast"
    )
    say(
        f"at accepted length {described['accepted_length']:g}: at most "
        f"{described['tokens_per_second_per_sequence_at_most']:,.0f} tokens/s a sequence, "
        f"{described['tokens_per_second_at_most']:,.0f} in all"
    )


def _memory_table(described: dict[str, Any]) -> Table:
    memory, whole = described["memory"], described["whole_model_bytes"]
    table = Table("memory", _right("GB a device"), _right("GB in all"), show_edge=False)
    for name, count in memory["weights"].items():
        table.add_row(name, _gb(count), _gb(whole.get(name, 0)))
    if memory["drafter"]:
        table.add_row("drafter", _gb(memory["drafter"]), _gb(whole["drafter"]))
    for name, count in memory["caches"].items():
        table.add_row(f"caches: {name}", _gb(count), "")
    for name, count in memory["workspace_estimate"].items():
        table.add_row(f"workspace: {name} (estimate)", _gb(count), "")
    table.add_section()
    table.add_row("used", _gb(memory["used"]), "")
    table.add_row("free" if memory["free"] >= 0 else "too much", _gb(abs(memory["free"])), "")
    return table


def _round_table(described: dict[str, Any]) -> Table:
    least, device = described["round"], described["device"]
    table = Table("a round, one device", _right("read GB"), _right("GFLOP"), _right("ms"), show_edge=False)
    for name in sorted(least["bytes_read"], key=lambda name: -least["bytes_read"][name]):
        shown = name
        if name == "experts":
            held, slowest = least["experts_held"], least["experts_of_slowest_device"]
            shown += f" ({least['experts_reached']:.1f} of {least['experts']} reached; {slowest:.1f} of {held} here)"
        read, flops = least["bytes_read"].get(name), least["flops"].get(name)
        table.add_row(shown, _gb(read) if read else "", f"{flops / 1e9:,.1f}" if flops else "", "")
    table.add_section()
    read, flops = sum(least["bytes_read"].values()), sum(least["flops"].values())
    table.add_row(
        f"HBM bandwidth, {device['hbm_bytes_per_s'] / 1e12:g} TB/s", _gb(read), "", _ms(least["bandwidth_seconds"])
    )
    table.add_row(
        f"FLOPs, {device['bf16_flops'] / 1e12:g} TFLOP/s", "", f"{flops / 1e9:,.1f}", _ms(least["flops_seconds"])
    )
    link = f"interconnect, {device['link']} at {device['link_bytes_per_s'] / 1e9:g} GB/s"
    if described["topology"]["tensor_parallel"] > device["linked_devices"]:
        beyond = device["network_bytes_per_s"]
        link += f", beyond {device['linked_devices']} at "
        link += f"{beyond / 1e9:g}" if beyond else "the same for want of a figure"
    table.add_row(link, "", "", _ms(least["interconnect_seconds"]))
    return table


def _collectives_table(described: dict[str, Any]) -> Table | str:
    if not described["round"]["collectives"]:
        return "no collectives: one device"
    table = Table("collectives", "kind", "over", show_edge=False)
    for name in ("a round", "payload kB", "sent kB", "ms"):
        table.add_column(name, justify="right")
    for one in described["round"]["collectives"]:
        sizes = (f"{one['payload_bytes'] / 1e3:,.1f}", f"{one['sent_bytes'] / 1e3:,.1f}")
        over = f"{one['axis']} ({one['devices']})"
        table.add_row(one["what"], one["kind"], over, f"{one['count']}", *sizes, _ms(one["seconds"]))
    return table


def scaling(plan: Plan) -> list[dict[str, Any]]:
    """Floors of more and fewer devices, with whole experts and with slices of every expert.

    Attention lies as `default_topology` says. `crossover` is the batch from which on whole experts cost at most 5 %
    more than slices, None if there is none; `refused` says why a model cannot be spread so.
    """
    found = []
    for devices in SCALES:
        whole = default_topology(devices)
        entry: dict[str, Any] = {"devices": devices}
        try:
            for name, topology in (("whole", whole), ("sliced", replace(whole, expert_parallel=1))):
                plans = [replace(plan, topology=topology, batch=batch) for batch in BATCHES]
                entry[name] = [
                    {"batch": p.batch, "floor_seconds": floor(p).seconds, "bound": floor(p).bound, "fits": p.fits()}
                    for p in plans
                ]
            entry["crossover"] = _crossover(entry["whole"], entry["sliced"])
        except TopologyError as error:
            entry = {"devices": devices, "refused": str(error)}
        found.append(entry)
    return found


def _crossover(whole: Sequence[dict[str, Any]], sliced: Sequence[dict[str, Any]]) -> int | None:
    crossover = None
    for one, other in zip(reversed(whole), reversed(sliced), strict=True):
        if one["floor_seconds"] > _NEARLY * other["floor_seconds"]:
            break
        crossover = one["batch"]
    return crossover


def report_scaling(found: Sequence[dict[str, Any]], console: Console) -> None:
    """Print floors against devices and batch."""
    known = [entry for entry in found if "refused" not in entry]
    table = Table("batch", title="floor of a round, ms: whole experts | slices of every expert", show_edge=False)
    for entry in known:
        for name in ("whole", "sliced"):
            table.add_column(f"{entry['devices']} {name}", justify="right")
    for i, batch in enumerate(BATCHES):
        cells = [entry[name][i] for entry in known for name in ("whole", "sliced")]
        table.add_row(f"{batch}", *(f"{_ms(c['floor_seconds'])}{' ' if c['fits'] else '*'}" for c in cells))
    if known:
        console.print(table)
        console.print("* does not fit into memory at this context", highlight=False)
    for entry in found:
        if "refused" in entry:
            said = entry["refused"]
        elif entry["crossover"] is None:
            said = f"whole experts cost over 5 % more than slices at every batch up to {BATCHES[-1]}"
        else:
            said = f"whole experts cost at most 5 % more than slices from batch {entry['crossover']} on"
        console.print(f"{entry['devices']} devices: {said}", highlight=False, soft_wrap=True)


def plot(plan: Plan, path: Path) -> None:
    """Draw the three roofs of a round against the batch into a picture."""
    floors: list[Floor] = [floor(replace(plan, batch=batch)) for batch in BATCHES]
    with drawing(path) as (axis,):
        for label, values in (
            ("HBM bandwidth", [f.bandwidth_seconds for f in floors]),
            ("FLOPs", [f.flops_seconds for f in floors]),
            ("interconnect", [f.interconnect_seconds for f in floors]),
        ):
            axis.plot(BATCHES, [1e3 * value for value in values], marker="o", markersize=3, label=label)
        fitting = [batch for batch in BATCHES if replace(plan, batch=batch).fits()]
        if fitting and fitting[-1] < BATCHES[-1]:
            axis.axvspan(fitting[-1], BATCHES[-1], alpha=0.1, color="black", label="does not fit")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(BATCHES, map(str, BATCHES))
        axis.set_xlabel("batch")
        axis.set_ylabel("floor of a round, ms")
        axis.set_title(
            f"{plan.topology.tensor_parallel} x {plan.device.name}, context {plan.context:,}, "
            f"verify length {plan.verify_length}",
            fontsize="medium",
        )
        axis.legend(fontsize="small")


def _found(positions: int, plan: Plan) -> str:
    limit = " (the model's own limit)" if positions == plan.model.config.max_positions else ""
    return f"{positions:,}{limit}"


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _gb(count: float) -> str:
    return f"{count / 1e9:,.3f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"
