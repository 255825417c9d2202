"""How long a round takes to compile, and to come back from the compilation cache when a process starts again.

Programs are made from shapes, for devices of a CPU that need not be there, so that any machine can measure the real
size. Every time is that of a process of its own, which runs this file.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

import jax

from mimo_jax.abstract import abstract_model
from mimo_jax.evaluation.bench import Spread
from mimo_jax.evaluation.processes import with_devices
from mimo_jax.placement import check
from mimo_jax.plan import DTYPE, default_topology
from mimo_jax.presets import PRESETS
from mimo_jax.request import SamplingParams, batch_requests
from mimo_jax.speculative import decode

CONTEXT = 4096
"""Positions that there are caches for."""
ROUNDS = 8
"""Of a dispatch."""


@dataclass(frozen=True)
class CompileResult:
    """What a process that starts takes to have a round's program."""

    what: str
    """How it finds the compilation cache: empty, or filled by such a process."""
    lower_seconds: Spread
    """To trace a round and lower it, for all devices."""
    compile_seconds: Spread
    """To compile that, or to read it back."""
    cpu_seconds: Spread
    """Of all cores, for both; on a busy machine it tells more than the clock."""
    process_seconds: Spread
    """Of the whole process; Python's start and imports come on top."""
    cache_hits: int
    """Programs that were found in the cache, in all runs."""
    cache_misses: int
    """Programs that were not."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def bench_compile(preset: str, devices: int, *, runs: int) -> list[CompileResult]:
    """Compile a round, and start again from what the compilation cache then has, `runs` times.

    Args:
        preset: Name of the model's size.
        devices: The model lies over them as `default_topology` says.
        runs: Each begins with an empty cache.

    Raises:
        TopologyError: The model cannot be cut that way.
        RuntimeError: A process failed.
    """
    check(default_topology(devices), *PRESETS[preset].configs())
    found: dict[str, list[dict[str, Any]]] = {"empty": [], "filled": []}
    for _ in range(runs):
        with TemporaryDirectory(prefix="mimo-jax-programs-") as cache:
            for measured in found.values():
                measured.append(_in_a_process(preset, devices, cache))
    return [_result(what, measured) for what, measured in found.items()]


def _result(what: str, runs: list[dict[str, Any]]) -> CompileResult:
    lower, compile_, cpu, process = (
        Spread.of([run[name] for run in runs]) for name in ("lower", "compile", "cpu", "process")
    )
    hits, misses = (sum(run[name] for run in runs) for name in ("hits", "misses"))
    return CompileResult(what, lower, compile_, cpu, process, hits, misses)


def _in_a_process(preset: str, devices: int, cache: str) -> dict[str, Any]:
    keeping = {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    begun = time.perf_counter()
    measured = with_devices(devices, __spec__.name, preset, str(devices), environment=keeping)
    return measured | {"process": time.perf_counter() - begun}


def _measure(preset: str, devices: int) -> dict[str, Any]:
    """Seconds to lower and to compile a round in this process, and what became of the cache's programs."""
    events: Counter[str] = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    config, drafter = PRESETS[preset].configs()
    topology = default_topology(devices)
    model = abstract_model(config, drafter, DTYPE, topology, topology.mesh())
    batch = topology.data_parallel
    requests = batch_requests([[0]] * batch, [SamplingParams()] * batch, (), config.vocab_size)
    arguments = (model.state_shapes(batch, CONTEXT), model.shaped(requests))
    block = drafter.block_size if drafter else 1
    begun, busy = time.perf_counter(), time.process_time()
    lowered = model.lowered(decode, arguments, {"rounds": ROUNDS, "verify_length": block})
    between = time.perf_counter()
    lowered.compile()
    seconds = {
        "lower": between - begun,
        "compile": time.perf_counter() - between,
        "cpu": time.process_time() - busy,
    }
    return seconds | {name: events[f"/jax/compilation_cache/cache_{name}"] for name in ("hits", "misses")}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
