"""`mimo-serve bench`: how fast a running server answers real prompts, measured from outside through gRPC."""

import argparse
import asyncio
import json
import sys
import uuid
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc

from mimo_jax.arguments import output_file, positive
from mimo_jax.evaluation.prompts import SCENARIOS
from mimo_jax.exit_status import exit_status
from mimo_jax.progress import counting_bar, output_console, require_matplotlib
from mimo_jax.tokenizer import Tokenizer
from serve.bench_client import Answer, Ask, Server, asked_by_turns, connected, run
from serve.bench_report import Report, draw, headline, summarize, tables
from serve.channel import above_zero, connection_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 if a request failed or for a fault of ours, 2 for what can be mended."""
    arguments = _parser().parse_args(argv)
    return exit_status(lambda: asyncio.run(_bench(arguments)), arguments.debug)


async def _bench(arguments: argparse.Namespace) -> int:
    for path in (arguments.json, arguments.plot):
        if path is not None:
            output_file(path)
    if arguments.plot is not None:
        require_matplotlib()
    try:
        async with connected(
            arguments.address, api_key=arguments.api_key, ca_file=arguments.ca_file, timeout=arguments.connect_timeout
        ) as server:
            described, answers, seconds = await _measure(server, arguments)
    except grpc.aio.AioRpcError as error:
        raise ValueError(f"{arguments.address}: {error.code().name}: {error.details()}") from None
    report = summarize(answers, seconds)
    _show(report, described, arguments)
    if arguments.plot is not None:
        draw(answers, report, arguments.plot)
    return 1 if report.failed else 0


async def _measure(server: Server, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Answer], float]:
    described = await server.describe()
    tokenizer = Tokenizer.from_folder(arguments.tokenizer) if arguments.tokenizer else await server.tokenizer()
    questions = asked_by_turns(tokenizer, arguments.scenario or SCENARIOS, arguments.num_prompts)
    ask = Ask(arguments.max_new_tokens, arguments.temperature, arguments.ignore_eos, arguments.seed)
    name = f"bench-{uuid.uuid4().hex[:12]}"
    warm = questions[: arguments.warmup]
    if warm:
        quiet: Any = lambda count: None
        await run(server, warm, ask, concurrency=len(warm), rate=None, seed=0, name=f"{name}-warmup", progress=quiet)
    if arguments.flush_cache:
        await server.flush_cache()
    concurrency = arguments.max_concurrency or (None if arguments.request_rate else 8)
    with counting_bar("requests", len(questions)) as advance:
        answers, seconds = await run(
            server,
            questions,
            ask,
            concurrency=concurrency,
            rate=arguments.request_rate,
            seed=arguments.seed,
            name=name,
            progress=advance,
        )
    return described, answers, seconds


def _show(report: Report, described: dict[str, Any], arguments: argparse.Namespace) -> None:
    load_text = f"{arguments.request_rate:g} requests/s, Poisson" if arguments.request_rate else ""
    if arguments.max_concurrency or not load_text:
        limit = f"at most {arguments.max_concurrency or 8} at once"
        load_text = f"{load_text}, {limit}" if load_text else limit
    console = output_console()
    console.print(f"{described['model']} ({described['version']}) at {arguments.address}, {load_text}")
    for table in tables(report):
        console.print(table)
    console.print(headline(report))
    if arguments.json is not None:
        asked = {name: value for name, value in vars(arguments).items() if name not in ("api_key", "debug")}
        whole = {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "server": described,
            "asked": asked,
            **report.as_json(),
        }
        arguments.json.write_text(json.dumps(whole, indent=2, default=str) + "\n", encoding="utf-8")


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mimo-serve bench",
        description="Send the frozen prompts to a running server and measure time to first token, time between tokens, "
        "throughput and what speculation gives.",
    )
    server = connection_arguments(parser)
    server.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the one that the server hands out")
    asked = parser.add_argument_group("requests")
    asked.add_argument(
        "--scenario", action="append", choices=SCENARIOS, metavar="NAME", help=f"of {', '.join(SCENARIOS)}; default all"
    )
    asked.add_argument("--num-prompts", type=positive, default=110, metavar="N", help="requests (default: 110)")
    asked.add_argument(
        "--max-concurrency", type=positive, metavar="N", help="requests at once (default: 8; no limit with a rate)"
    )
    asked.add_argument(
        "--request-rate",
        type=above_zero,
        metavar="R",
        help="requests a second, at random times (default: as they fit)",
    )
    asked.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="default: 256")
    asked.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    asked.add_argument("--ignore-eos", action="store_true", help="make every answer as long as it may be")
    asked.add_argument("--seed", type=_natural, default=0, metavar="N", help="of arrivals and samples (default: 0)")
    asked.add_argument("--warmup", type=_natural, default=2, metavar="N", help="requests before the measured ones")
    asked.add_argument("--flush-cache", action="store_true", help="empty the prefix cache after the warm-up")
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    out.add_argument("--plot", type=Path, metavar="FILE", help="also draw them there (PNG, SVG or PDF)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
