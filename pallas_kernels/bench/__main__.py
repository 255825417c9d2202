"""Time every kernel against memory's own speed and against what one would run instead, side by side in one run."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pallas_kernels.bench.cases import REAL, SMALL, Arrays, Case, cases

CALLS = 16
"""In one program, so that starting it costs a call little."""
COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Timing:
    """One way to run one case."""

    op: str
    shape: str
    backend: str
    microseconds: float | None = None
    """Of a call: the median of the runs."""
    gigabytes_per_second: float | None = None
    """Bytes that must be moved, over the time."""
    of_copy: float | None = None
    """The same as a share of the bandwidth of a copy in the same run."""
    teraflops: float | None = None
    error: float | None = None
    """Relative, in the Frobenius norm, to the reference in float32."""
    refused: str | None = None
    """Why there is no time."""


def main() -> None:
    """Parse the command line, run, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--op", help="only ops whose name contains this")
    parser.add_argument("--runs", type=int, default=7, help="of which the median counts (default: 7)")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the command on any machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not arguments.small:
        sys.exit(f"There is no GPU here, only {device.device_kind}. With --small, small shapes run anywhere.")
    for path in (arguments.json, arguments.plot):
        if path is not None and not path.resolve().parent.is_dir():
            sys.exit(f"{path}: there is no folder {path.resolve().parent}")

    copy = copy_bandwidth(COPIED_BYTES >> (7 if arguments.small else 0), arguments.runs)
    chosen = [c for c in cases(SMALL if arguments.small else REAL) if arguments.op is None or arguments.op in c.op]
    if not chosen:
        sys.exit(f"no op's name contains {arguments.op!r}")
    found: list[Timing] = []
    for case in track(chosen, "kernels", console=Console(stderr=True)):
        found += timings(case, copy, arguments.runs)
    machine = {"device": device.device_kind, "jax": jax.__version__, "date": str(date.today()), "host": platform.node()}
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{machine['device']}, jax {machine['jax']}, {machine['date']}: a copy moves {copy / 1e9:.0f} GB/s")
    console.print(table(found))
    for reason in dict.fromkeys(f"{t.op} by {t.backend}: {t.refused}" for t in found if t.refused):
        console.print(reason, highlight=False)
    if arguments.json:
        whole = {"machine": machine, "command": sys.argv[1:], "copy_gigabytes_per_second": copy / 1e9}
        arguments.json.write_text(json.dumps(whole | {"timings": [asdict(t) for t in found]}, indent=2) + "\n")
    if arguments.plot:
        plot(found, arguments.plot)


def copy_bandwidth(nbytes: int, runs: int) -> float:
    """Bytes a second, read and written, of a copy in memory."""
    x = jnp.zeros(nbytes // 4, jnp.float32)
    return 2 * nbytes / seconds(jax.jit(lambda x: x + 1), (x,), runs)


def timings(case: Case, copy: float, runs: int) -> list[Timing]:
    """Every way to run a case."""
    arguments = case.make(np.random.default_rng(0))
    moved, flops = case.moved(arguments), case.flops(arguments)
    reference = list(case.run.values())[1]
    wide = tuple(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in arguments)
    expected = np.asarray(jax.jit(reference)(jnp.int32(0), *wide), np.float64)
    found = []
    for name, run in case.run.items():
        given = case.more[name](arguments) if name in case.more else arguments
        try:
            out = np.asarray(jax.jit(run)(jnp.int32(0), *given), np.float64)
            took = seconds(many(run, case.layers), given, runs) / CALLS
        except Exception as error:  # one that cannot run must not keep the others from being timed
            found.append(Timing(case.op, case.shape, name, refused=str(error).splitlines()[0][:200]))
            continue
        found.append(
            Timing(
                case.op,
                case.shape,
                name,
                1e6 * took,
                moved / took / 1e9,
                moved / took / copy,
                flops / took / 1e12,
                float(np.linalg.norm(out - expected) / np.linalg.norm(expected)),
            )
        )
    return found


def many(run: Callable[..., jax.Array], layers: int) -> Callable[..., jax.Array]:
    """A program of `CALLS` calls, one after another, each of another layer."""

    @jax.jit
    def program(x: jax.Array, *rest: jax.Array) -> jax.Array:
        def call(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, _ = carry
            return jax.lax.optimization_barrier((x, run(i % layers, x, *rest)))  # the next call waits for this one

        return jax.lax.fori_loop(1, CALLS, call, (x, run(jnp.int32(0), x, *rest)))[1]

    return program


def seconds(program: Callable[..., object], arguments: Arrays, runs: int) -> float:
    """The median of some runs after one that compiles."""
    jax.block_until_ready(program(*arguments))
    took = []
    for _ in range(runs):
        begun = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


def table(found: list[Timing]) -> Table:
    """For people."""
    shown = Table(show_edge=False)
    for name in ("op", "shape", "by"):
        shown.add_column(name)
    for name in ("us", "GB/s", "of a copy", "TFLOP/s", "error"):
        shown.add_column(name, justify="right")
    before = None
    for t in found:
        new = (t.op, t.shape) != before
        before = t.op, t.shape
        label = (t.op, t.shape) if new else ("", "")
        if t.microseconds is None:
            shown.add_row(*label, f"{t.backend}: cannot run")
            continue
        shown.add_row(
            *label,
            t.backend,
            f"{t.microseconds:.1f}",
            f"{t.gigabytes_per_second:.0f}",
            f"{t.of_copy:.0%}",
            f"{t.teraflops:.1f}",
            f"{t.error:.1e}",
        )
    return shown


def plot(found: list[Timing], path: Path) -> None:
    """Shares of the copy's bandwidth, a panel an op."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    timed = [t for t in found if t.of_copy is not None]
    ops = list(dict.fromkeys(t.op for t in timed))
    figure, axes = pyplot.subplots(len(ops), 1, figsize=(10, 3 * len(ops)), layout="constrained", squeeze=False)
    for axis, op in zip(axes[:, 0], ops, strict=True):
        of_op = [t for t in timed if t.op == op]
        shapes, names = (list(dict.fromkeys(getattr(t, what) for t in of_op)) for what in ("shape", "backend"))
        for i, name in enumerate(names):
            shares = {t.shape: t.of_copy for t in of_op if t.backend == name}
            at = [s + 0.8 * i / len(names) for s in range(len(shapes))]
            axis.bar(at, [shares.get(s, 0) for s in shapes], 0.8 / len(names), label=name)
        axis.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right", fontsize=7)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set_ylabel("share of copy bandwidth")
        axis.set_title(op)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
