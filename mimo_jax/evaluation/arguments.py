"""Arguments of `mimo-jax bench` and `mimo-jax eval`."""

import argparse
from pathlib import Path

from mimo_jax.arguments import model_arguments, positive, positives
from mimo_jax.evaluation.prompts import SCENARIOS
from mimo_jax.presets import PRESETS


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand that measures speed."""
    parser = commands.add_parser(
        "bench", help="measure speed", description="Measure loading, compiling and decoding on this machine."
    )
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    decode = kinds.add_parser(
        "decode",
        help="prefill, plain and speculative decode of random prompts, cost by context",
        description="Measure prefill, plain and speculative decode of random prompts, and a round's cost by context.",
    )
    model_arguments(decode)
    decode.add_argument("--batch", type=positive, default=1, metavar="N")
    decode.add_argument("--prompt-tokens", type=positive, default=128, metavar="N")
    decode.add_argument("--new-tokens", type=positive, default=128, metavar="N")
    decode.add_argument(
        "--contexts",
        type=positives,
        default="1024,4096,16384,65536,131072",
        metavar="N,N,...",
        help="contexts at which one round is timed with filled caches; empty for none",
    )
    decode.set_defaults(handler="mimo_jax.evaluation.commands:bench_decode_command")
    scenarios = kinds.add_parser(
        "scenarios",
        help="speculative against plain decode of real prompts",
        description="Decode the frozen prompts plainly and speculatively in turn, one at a time.",
    )
    model_arguments(scenarios)
    _scenario_arguments(scenarios, prompts=4, tokens=192)
    scenarios.set_defaults(handler="mimo_jax.evaluation.commands:bench_scenarios")
    loading = kinds.add_parser(
        "load",
        help="loading, beside a raw read of the same bytes",
        description="Load a model and read its bytes in turn, with files in the page cache. With --snapshot, also "
        "restore that.",
    )
    model_arguments(loading)
    loading.set_defaults(handler="mimo_jax.evaluation.commands:bench_load_command")
    shard = kinds.add_parser(
        "shard",
        help="one device's share of a round at real size",
        description="Time draft and verify of as much as one of several devices has of a model, on one device, with "
        "random weights and without collectives, beside the floor that `mimo-jax plan` gives.",
    )
    shard.add_argument("--preset", choices=sorted(PRESETS), default="mimo-v2.5-pro", help="default: %(default)s")
    shard.add_argument(
        "--devices",
        type=positive,
        default=8,
        metavar="N",
        help="that share it, whole experts on each (default: 8)",
    )
    shard.add_argument("--batches", type=positives, default="1,4,16,64", metavar="N,N,...", help="default: %(default)s")
    shard.add_argument(
        "--contexts", type=positives, default="1024,16384,131072", metavar="N,N,...", help="default: %(default)s"
    )
    shard.set_defaults(handler="mimo_jax.evaluation.commands:bench_shard_command")
    compiling = kinds.add_parser(
        "compile",
        help="compiling a round at real size, and starting again from the compilation cache",
        description="Compile a round from shapes alone, for devices of a CPU that need not be there, and start again "
        "in a process that finds it in the compilation cache. The model lies over the devices as in `plan` where no "
        "topology is given. Needs no weights.",
    )
    compiling.add_argument(
        "--preset", choices=sorted(PRESETS), default="mimo-v2.5-pro", help="default: mimo-v2.5-pro, with its drafter"
    )
    compiling.add_argument("--devices", type=positive, default=16, metavar="N", help="default: 16")
    compiling.set_defaults(handler="mimo_jax.evaluation.commands:bench_compile_command")
    signals = kinds.add_parser(
        "signals",
        help="blocks a second of drafter training on sequences cut over devices, and bytes between these",
        description="Train a drafter's blocks, with random weights and features, on sequences that are cut over 1 to 8 "
        "devices of this machine's CPU: by parts of one length (weak scaling) and by parts of one sequence (strong).",
    )
    signals.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="default: tiny, with its drafter")
    signals.add_argument("--length", type=positive, default=131072, metavar="N", help="default: 131072")
    signals.add_argument("--anchors", type=positive, default=512, metavar="N", help="of the longest (default: 512)")
    signals.add_argument("--picture", type=Path, metavar="FILE", help="also draw them there (PNG, SVG or PDF)")
    signals.set_defaults(handler="mimo_jax.evaluation.commands:bench_signals_command")
    for kind, runs in ((decode, 5), (scenarios, 5), (loading, 5), (shard, 5), (compiling, 3), (signals, 5)):
        kind.add_argument("--runs", type=positive, default=runs, metavar="N", help=f"default: {runs}")
        kind.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")


def add_eval(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand that measures models rather than machines."""
    parser = commands.add_parser("eval", help="measure quality and acceptance", description="Measure a model.")
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    acceptance = kinds.add_parser(
        "acceptance",
        help="accepted length by scenario and position",
        description="Answer the frozen prompts, greedily and at temperature 1, and count what a round gives.",
    )
    model_arguments(acceptance)
    _scenario_arguments(acceptance, prompts=22, tokens=256)
    acceptance.add_argument("--batch", type=positive, default=8, metavar="N", help="default: 8")
    acceptance.set_defaults(handler="mimo_jax.evaluation.commands:eval_acceptance")
    quality = kinds.add_parser(
        "quality",
        help="two checkpoints against each other",
        description="Compare two checkpoints: perplexity on held-out text and exact answers, with 95 %% intervals.",
    )
    quality.add_argument("--model", type=Path, required=True, metavar="DIR", help="what is compared")
    quality.add_argument("--against", type=Path, required=True, metavar="DIR", help="the reference")
    quality.add_argument("--texts", type=positive, default=40, metavar="N", help="a scenario (default: 40)")
    quality.add_argument(
        "--run-code",
        action="store_true",
        help="also run the functions that the models write, in processes of their own: no sandbox",
    )
    quality.set_defaults(handler="mimo_jax.evaluation.commands:eval_quality")
    for kind in (acceptance, quality):
        kind.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
        kind.add_argument("--picture", type=Path, metavar="FILE", help="also draw them there (PNG, SVG or PDF)")


def _scenario_arguments(parser: argparse.ArgumentParser, *, prompts: int, tokens: int) -> None:
    parser.add_argument(
        "--scenario", action="append", choices=SCENARIOS, metavar="NAME", help=f"of {', '.join(SCENARIOS)}; default all"
    )
    parser.add_argument(
        "--prompts", type=positive, default=prompts, metavar="N", help=f"at most, a scenario (default: {prompts})"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=tokens, metavar="N", help=f"default: {tokens}")
