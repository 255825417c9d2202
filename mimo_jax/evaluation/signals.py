"""How fast a drafter's blocks are trained on sequences that are cut over devices, and what these send to each other.

Devices are those of a CPU and share its cores: blocks a second of all together can only stay level, and what they lose
is what cutting costs. What is sent is read from the compiled program, and is that of any machine.

Each number of devices has a process of its own, which runs this file.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from mimo_jax.backbone import Backbone
from mimo_jax.config import DrafterConfig
from mimo_jax.drafter import Drafter
from mimo_jax.evaluation.bench import Spread
from mimo_jax.evaluation.processes import with_devices
from mimo_jax.params import Declared
from mimo_jax.presets import PRESETS
from mimo_jax.training.drafter_training import DrafterTrainer, Text, local_loss
from mimo_jax.training.groups import Groups
from mimo_jax.training.initialization import initial_params
from mimo_jax.training.local_shard import Edges
from mimo_jax.training.optimizers import OptimizerConfig, make_optimizer
from sharding.compiled import collectives
from sharding.topology import Topology

DEVICES = (1, 2, 4, 8)
MOST = DEVICES[-1]

Scaling = Literal["weak", "strong"]
"""Weak: parts of one length, so longer sequences on more devices; strong: one sequence in smaller parts."""


@dataclass(frozen=True)
class SignalsResult:
    """Loss and gradients of the blocks of one sequence, its features given."""

    scaling: Scaling
    edges: Edges
    devices: int
    length: int
    anchors: int
    """Blocks, of all devices together."""
    milliseconds: Spread
    sums_bytes: int
    """Of the sums over all devices that normalise the loss."""
    context_bytes: int
    """Of context keys and values from the neighbours, and of their gradients on the way back."""
    gradient_bytes: int
    """Of the drafter's gradients, summed over all devices."""

    @property
    def anchors_per_second(self) -> float:
        """Of all devices together."""
        return 1e3 * self.anchors / self.milliseconds.median

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "anchors_per_second": self.anchors_per_second}


def bench_signals(
    preset: str, length: int, anchors: int, *, runs: int, progress: Callable[[int], None] = lambda count: None
) -> list[SignalsResult]:
    """Train blocks on 1 to 8 devices, by weak and by strong scaling, with both ways at edges.

    Args:
        preset: Whose drafter, with random weights.
        length: Positions of the longest sequence.
        anchors: Blocks of that one; a shorter one has as many fewer.
        runs: Each case's, after one that warms up.
        progress: Called with the number of cases that are done.

    Raises:
        ValueError: Length or anchors do not fall into 8 parts, or these are too short.
    """
    drafter = _drafter(preset)
    if length % MOST or anchors % MOST:
        raise ValueError(f"length {length} and anchors {anchors} must both be multiples of {MOST}, the most devices")
    needed = (drafter.attention.visible_keys or 0) + drafter.block_size + anchors // MOST
    if length // MOST < needed:
        raise ValueError(f"length {length} is too short: parts have {length // MOST} positions, of {needed} at least")
    found: list[SignalsResult] = []
    for devices in DEVICES:
        cases: list[tuple[Scaling, Edges, int, int, int]] = [
            (scaling, edges, devices, length // times, anchors // times)
            for scaling, times in _times(devices)
            for edges in get_args(Edges)
        ]
        measured = with_devices(devices, __spec__.name, preset, str(runs), json.dumps(cases))
        for case, (milliseconds, nbytes) in zip(cases, measured, strict=True):
            found.append(SignalsResult(*case, Spread.of(milliseconds), *nbytes))
        progress(len(cases))
    return sorted(found, key=lambda r: (r.scaling == "strong", r.edges))


def _times(devices: int) -> tuple[tuple[Scaling, int], ...]:
    """How many times shorter than the longest a sequence on so many devices is."""
    return ("weak", MOST // devices), ("strong", 1)


def _drafter(preset: str) -> DrafterConfig:
    drafter = PRESETS[preset].configs()[1]
    if drafter is None:
        raise ValueError(f"the preset {preset} has no drafter")
    return drafter


@cache
def _measure(
    preset: str, runs: int, edges: Edges, devices: int, length: int, anchors: int
) -> tuple[list[float], tuple[int, int, int]]:
    """Milliseconds of every run, and bytes: of sums, of context and of gradients."""
    config, drafter_config = PRESETS[preset].configs()[0], _drafter(preset)
    topology = Topology(devices, devices, dp_attention=True, dp_lm_head=True)
    groups = Groups(topology, topology.mesh(), cut_sequences=True)
    backbone = Declared(lambda: Backbone(config, "float32", topology))
    drafter = Declared(lambda: Drafter(drafter_config, "float32", topology))
    optimizer = make_optimizer(drafter.axes, OptimizerConfig(), 1)
    trainer = DrafterTrainer(backbone, drafter, optimizer, anchors=anchors, groups=groups, edges=edges)

    frozen = groups.placed(initial_params(backbone, len(config.layers), 0), backbone.axes)
    params = groups.placed(initial_params(drafter, drafter_config.num_layers, 1), drafter.axes)
    shape = (1, length, len(drafter_config.target_layer_ids), config.hidden_size)
    made = jax.jit(lambda key: jax.random.normal(key, shape), out_shardings=groups.shardings(groups.rows))
    captured = made(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (1, length), 0, config.vocab_size)
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    text = Text(ids, jnp.ones((1, length), bool), positions, captured, captured[:, :, -1])

    lies = Text.lies(groups)
    lie = groups.specs(params, drafter.axes), groups.specs(frozen, backbone.axes), lies, jax.P()
    loss = groups.on_all(partial(local_loss, trainer), lie, jax.P())
    given = params, frozen, text
    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*given, jax.random.key(0)).compile()
    times = []
    for run in range(runs + 1):
        begin = time.perf_counter()
        jax.block_until_ready(program(*given, jax.random.key(run)))
        times.append(1e3 * (time.perf_counter() - begin))
    if devices == 1:  # its program may hold sums over one device
        return times[1:], (0, 0, 0)
    return times[1:], _sent(program.as_text() or "", 4 * (4 + 2 * (drafter_config.block_size - 1)))


def _sent(program: str, sums: int) -> tuple[int, int, int]:
    found = list(collectives(program))
    reduced = [size for kind, size in found if kind == "all-reduce"]
    context = sum(size for kind, size in found if kind == "collective-permute")
    if other := {kind for kind, _ in found} - {"all-reduce", "collective-permute"}:
        raise RuntimeError(f"the program has collectives that are none of its own: {', '.join(sorted(other))}")
    return sum(s for s in reduced if s <= sums), context, sum(s for s in reduced if s > sums)


if __name__ == "__main__":
    print(json.dumps([_measure(sys.argv[1], int(sys.argv[2]), *case[1:]) for case in json.loads(sys.argv[3])]))
