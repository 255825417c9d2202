"""`mimo-serve overhead`: what serving costs on this machine, against offline decoding and in host time."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.table import Table

from mimo_jax.arguments import positive, positives
from mimo_jax.evaluation.reporting import check_outputs, report
from mimo_jax.evaluation.tables import spread
from mimo_jax.exit_status import exit_status
from mimo_jax.progress import counting_bar
from serve.bench_client import Ask
from serve.flags import parse
from serve.local_server import client_process
from serve.overhead_host import HostCost, measure_host
from serve.overhead_offline import Comparison, compare
from serve.resolution import resolve


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 for a fault of ours, 2 for what can be mended."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments, rest = _parser().parse_known_args(words)
    return exit_status(lambda: arguments.run(arguments, rest), arguments.debug)


def _offline(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    check_outputs(arguments.json)
    served = parse(flags, "mimo-serve overhead offline")
    if served.device is not None:
        jax.config.update("jax_platforms", served.device)
    options = resolve(served)
    ask = Ask(arguments.max_new_tokens, arguments.temperature, ignore_eos=True, seed=options.random_seed)
    with client_process() as client, counting_bar("pairs", arguments.runs) as advance:
        found = compare(client, options, ask, runs=arguments.runs, progress=advance)
    more = f"{options.served_model_name}, {options.rounds_per_dispatch} rounds a dispatch"
    report(
        "mimo-serve",
        [_comparison(found)],
        {"offline": found.as_json(), "server": options.as_json()},
        more,
        arguments.json,
    )
    return 0


def _host(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    check_outputs(arguments.json)
    if flags:
        raise ValueError(f"unknown argument {flags[0]}: only `overhead offline` takes the server's flags")
    cases = [(n, step) for step in arguments.step_milliseconds for n in arguments.streams]
    found = []
    with client_process() as client, counting_bar("runs", len(cases) * (arguments.runs + 1)) as advance:
        for streams, step in cases:
            cost = measure_host(
                client, streams, step / 1e3, rounds=arguments.rounds, runs=arguments.runs, progress=advance
            )
            found.append(cost)
    more = f"{arguments.rounds} rounds of every stream, {arguments.runs} runs"
    report("mimo-serve", [_costs(found)], {"host": [cost.as_json() for cost in found]}, more, arguments.json)
    return 0


def _comparison(found: Comparison) -> Table:
    title = (
        f"{found.requests} requests, {found.prompt_tokens:,} prompt and {found.new_tokens:,} new tokens: "
        "median (lowest-highest)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("tok/s", "s to all first tokens", "s of processor time"):
        table.add_column(name, justify="right")
    for name, side in (("offline", found.offline), ("server", found.server)):
        cells = (side.tokens_per_second, side.first_tokens_seconds, side.processor_seconds)
        table.add_row(name, *(spread(c, 2) for c in cells))
    table.add_section()
    table.add_row("server / offline", spread(found.ratio, 3), "", "")
    table.add_row("offline / server", "", "", spread(found.processor_ratio, 3))
    agreed = found.requests - found.different
    table.caption, table.caption_justify = f"{agreed} of {found.requests} answers are the same tokens", "left"
    return table


def _costs(found: Sequence[HostCost]) -> Table:
    table = Table(title="Microseconds of the host, median (lowest-highest)", title_justify="left")
    table.add_column("device's step, ms", justify="right")
    table.add_column("streams", justify="right")
    names = ("a round", "beyond the device", "CPU a round", "of it the engine", "CPU a message")
    for name in names:
        table.add_column(name, justify="right")
    for cost in found:
        cells = (cost.round, cost.beyond_device, cost.cpu_round, cost.engine_round, cost.cpu_message)
        table.add_row(f"{cost.step_milliseconds:g}", str(cost.streams), *(spread(c, 0) for c in cells))
    return table


def _milliseconds(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < 1e4 for value in values):
        raise argparse.ArgumentTypeError(f"must be milliseconds between commas, such as 0,2,5, not {text!r}")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mimo-serve overhead",
        description="Measure what serving costs, with a server of its own on this machine and a client in a process of "
        "its own. Other work on the machine is in the figures: medians and ratios are what to look at.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    offline = kinds.add_parser(
        "offline",
        help="tokens a second of one batch through the server and through offline decoding, in turn",
        description="Answer as many frozen prompts as the server runs at once, with the same seeds, through the server "
        "and through offline decoding, in turn. All flags of the server may follow: see mimo-serve --help.",
        allow_abbrev=False,
    )
    offline.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="a request (default: 256)")
    offline.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    offline.add_argument("--runs", type=positive, default=5, metavar="N", help="pairs after a warm-up (default: 5)")
    offline.set_defaults(run=_offline)
    host = kinds.add_parser(
        "host",
        help="microseconds of host time a round and a message, with a device that only waits",
        description="Serve requests on a device that takes a fixed time for a step and computes nothing: everything "
        "else is the server, from gRPC to the commands that the device gets.",
        allow_abbrev=False,
    )
    host.add_argument("--streams", type=positives, default="1,16,64", metavar="N,N,...", help="default: 1,16,64")
    host.add_argument(
        "--step-milliseconds", type=_milliseconds, default="0,2,5", metavar="T,T,...", help="default: 0,2,5"
    )
    host.add_argument("--rounds", type=positive, default=256, metavar="N", help="of every stream (default: 256)")
    host.add_argument("--runs", type=positive, default=5, metavar="N", help="after a warm-up (default: 5)")
    host.set_defaults(run=_host)
    for kind in (offline, host):
        kind.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
        kind.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
