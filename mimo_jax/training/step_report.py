"""The plan of a training step as plain values and as tables, and its program compiled from shapes."""

import json
import sys
import time
from collections import Counter
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from mimo_jax.devices import Device
from mimo_jax.evaluation.processes import with_devices
from mimo_jax.plan_report import topology_words
from mimo_jax.presets import PRESETS
from mimo_jax.training.drafter_training import drafter_step
from mimo_jax.training.step_plan import StepPlan
from sharding.compiled import collectives
from sharding.topology import Topology


def describe(plan: StepPlan) -> dict[str, Any]:
    """All that a plan tells, as plain values; bytes and FLOPs are one device's, times are seconds."""
    floor, signals = max(plan.seconds.values()), plan.anchors * (plan.drafter.block_size - 1)
    return {
        "device": asdict(plan.device),
        "topology": asdict(plan.topology),
        "load": {
            "batch": plan.batch,
            "length": plan.length,
            "anchors": plan.anchors,
            "cut_sequences": plan.cut_sequences,
            "edges": plan.edges,
        },
        "arguments": plan.arguments,
        "workspace_estimate": plan.workspace,
        "used": plan.used,
        "fits": plan.used <= plan.device.memory_bytes,
        "flops": plan.flops,
        "sent_bytes": plan.sent,
        "seconds": plan.seconds,
        "floor_seconds": floor,
        "signals_per_second_at_most": signals / floor,
    }


def report(described: dict[str, Any], console: Console, title: str) -> None:
    """Print a plan for people."""
    load, device = described["load"], described["device"]
    console.print(f"[bold]{title}[/]", highlight=False, soft_wrap=True)
    cut = f", cut over the groups, edges: {load['edges']}" if load["cut_sequences"] else ""
    console.print(f"{load['batch']} x {load['length']:,} positions{cut}; {load['anchors']:,} blocks", highlight=False)
    memory = Table("memory", _right("GB a device"), show_edge=False)
    for name, size in described["arguments"].items():
        memory.add_row(name, f"{size / 1e9:,.3f}")
    for name, size in described["workspace_estimate"].items():
        memory.add_row(f"{name} (estimate)", f"{size / 1e9:,.3f}")
    memory.add_section()
    memory.add_row("used", f"{described['used'] / 1e9:,.3f}")
    memory.add_row("of", f"{device['memory_bytes'] / 1e9:,.3f}")
    console.print(memory)
    work = Table("a step, one device", _right("TFLOP"), _right("ms at peak"), show_edge=False)
    for name, flops in described["flops"].items():
        work.add_row(name, f"{flops / 1e12:,.2f}", f"{1e3 * flops / device['bf16_flops']:,.1f}")
    console.print(work)
    sent = Table("sent by one device", _right("GB"), show_edge=False)
    for name, size in described["sent_bytes"].items():
        sent.add_row(name, f"{size / 1e9:,.3f}")
    console.print(sent)
    floors = ", ".join(f"{name} {1e3 * seconds:,.0f} ms" for name, seconds in described["seconds"].items())
    console.print(f"{floors}: at most {described['signals_per_second_at_most']:,.0f} signals/s", highlight=False)
    if compiled := described.get("compiled"):
        console.print(
            f"compiled in {compiled['seconds']:.0f} s: arguments {compiled['argument_bytes'] / 1e9:,.3f} GB, "
            f"temporaries {compiled['temporary_bytes'] / 1e9:,.3f} GB on a CPU; "
            + ", ".join(f"{n} {kind}" for kind, n in sorted(compiled["collectives"].items())),
            highlight=False,
            soft_wrap=True,
        )


def heading(name: str, plan: StepPlan) -> str:
    """What is planned, in words."""
    devices = plan.topology.tensor_parallel
    return f"training the drafter of {name} on {devices} x {plan.device.name}: {topology_words(plan.topology)}"


def compiled(preset: str, plan: StepPlan) -> dict[str, Any]:
    """What XLA says of the step's program, compiled for as many devices of a CPU in a process of its own."""
    names = [f.name for f in fields(plan) if f.name not in ("config", "drafter")]
    given = {name: getattr(plan, name) for name in names} | {
        "topology": asdict(plan.topology),
        "device": asdict(plan.device),
    }
    return with_devices(plan.topology.tensor_parallel, "mimo_jax.training.step_report", preset, json.dumps(given))


def _compile(plan: StepPlan) -> dict[str, Any]:
    begun = time.perf_counter()
    trainer, (state, batch, frozen, key) = plan.program(plan.topology.mesh())
    done = drafter_step.lower(trainer, state, batch, frozen, key).compile()
    memory = done.memory_analysis()
    assert memory is not None
    return {
        "seconds": time.perf_counter() - begun,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": Counter(kind for kind, _ in collectives(done.as_text() or "")),
    }


def _right(name: str) -> Column:
    return Column(name, justify="right")


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    of = {"topology": Topology(**given.pop("topology")), "device": Device(**given.pop("device"))}
    config, drafter = PRESETS[sys.argv[1]].configs()
    assert drafter is not None
    print(json.dumps(_compile(StepPlan(config, drafter, **of, **given))))
