"""The `mimo-jax` command: arguments in, one of the library's functions, text or JSON out."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from mimo_jax.arguments import device_arguments, host_arguments, hosts, model_arguments, positive, topology_arguments
from mimo_jax.compilation_cache import keep_programs
from mimo_jax.evaluation.arguments import add_bench, add_eval
from mimo_jax.exit_status import exit_status
from mimo_jax.training.arguments import add_train


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 2 for what the person can mend, 1 for a fault of ours."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if arguments.debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("jax", "absl", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    def work() -> int:
        with hosts(arguments):
            keep_programs(jax.default_backend())
            module, function = arguments.handler.split(":")
            getattr(importlib.import_module(module), function)(arguments)
        return 0

    status = exit_status(work, arguments.debug)
    if status == 1:
        print("This is a fault of mimo-jax; run again with --debug for the traceback.", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mimo-jax",
        description="Run MiMo-V2 models with DFlash speculative decoding from Hugging Face checkpoint folders.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = (_generate, _inspect, _topology, _plan, _synthesize, _quantize, _score, _score_draft)
    for add in (*own, add_bench, add_eval, add_train):
        add(commands)
    _debug(parser)
    return parser


def _debug(parser: argparse.ArgumentParser) -> None:
    """Give every command, and every step of one that has steps, the same last option."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in nested:
        for command in action.choices.values():
            _debug(command)
    if not nested:
        parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks")


def _generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="text in, text out",
        description="Continue prompts. Text streams as it is decoded; a line of statistics follows on stderr.",
    )
    model_arguments(parser)
    host_arguments(parser)
    group = parser.add_argument_group("prompt (default: standard input)").add_mutually_exclusive_group()
    group.add_argument("--ask", metavar="TEXT", help="a question: a chat of this one message")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times: one batch")
    group.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="one prompt a line; .jsonl: a string, a list of token ids or a list of chat messages a line",
    )
    group.add_argument("--chat", metavar="FILE", help="JSON list of chat messages (- for standard input)")
    group.add_argument("--prompt-ids", action="append", metavar="JSON", help="token ids, as [1, 2, 3]; may be repeated")
    parser.add_argument("--no-thinking", action="store_true", help="render chat with thinking off")

    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all (default)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: all (default)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0: all (default)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1: none (default)")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="0: none (default)")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="0: none (default)")
    group.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID:BIAS", help="added to a token's logit; may be repeated"
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the output; may be repeated")
    group.add_argument("--stop-token-id", action="append", type=int, default=[], metavar="ID", help="may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on past end-of-text tokens")

    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--verify-length",
        type=positive,
        metavar="N",
        help="rows the backbone verifies a round: 1 (no drafts) to the drafter's block (default)",
    )
    group.add_argument("--rounds-per-dispatch", type=positive, default=8, metavar="N", help="default: 8")
    group.add_argument(
        "--sampled-drafts", action="store_true", help="draw drafts instead of taking the best, verify by rejection"
    )

    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object a prompt, and one of totals")
    group.add_argument("--trace", action="store_true", help="with --json: every round's drafts, tokens and counts")
    parser.set_defaults(handler="mimo_jax.commands:generate")


def _inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("inspect", help="what a checkpoint is", description="Describe a checkpoint folder.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--qkv-layout", choices=("auto", "chunked", "canonical"), default="auto")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(handler="mimo_jax.commands:inspect")


def _topology(commands: argparse._SubParsersAction) -> None:
    from mimo_jax.presets import PRESETS

    parser = commands.add_parser(
        "topology",
        help="what each device would hold",
        description="Draw which device holds which heads, experts, vocabulary rows and sequences, or say why a model "
        "cannot be spread so. Needs neither the devices nor the weights.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", type=Path, metavar="DIR", help="checkpoint folder; only its and its drafter's config.json are read"
    )
    model.add_argument("--preset", choices=sorted(PRESETS), help="a size that is known by name")
    topology_arguments(parser)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(handler="mimo_jax.commands:topology")


def _plan(commands: argparse._SubParsersAction) -> None:
    from mimo_jax.presets import PRESETS

    parser = commands.add_parser(
        "plan",
        help="what fits where, and how fast a round can be at most",
        description="Tell from shapes alone what every device holds, which context and batch fit, and the least time a "
        "round can take by bandwidth, FLOPs and interconnect. Needs neither the devices nor the weights. Without "
        "topology options, experts are whole and attention lies over all devices, or over groups of 8 beyond 8.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", type=Path, metavar="DIR", help="checkpoint folder; only its and its drafter's config.json are read"
    )
    model.add_argument("--preset", choices=sorted(PRESETS), help="a size that is known by name")
    device_arguments(parser, "8xH200")
    topology_arguments(parser, size=None)

    group = parser.add_argument_group("load")
    group.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences (default: 1)")
    group.add_argument(
        "--context", type=positive, metavar="N", help="positions of each (default: 131072, or what the model has)"
    )
    group.add_argument(
        "--verify-length", type=positive, metavar="N", help="rows verified a round (default: the drafter's block)"
    )
    group.add_argument(
        "--accepted-length",
        type=float,
        metavar="X",
        help="tokens a round gives, the backbone's own included (default: the verify length, as if all were accepted)",
    )

    group = parser.add_argument_group("output")
    group.add_argument(
        "--scaling", action="store_true", help="also floors on 8 to 64 devices, whole and sliced experts"
    )
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the floors against batches of 1 to 256")
    group.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(handler="mimo_jax.commands:plan")


def _synthesize(commands: argparse._SubParsersAction) -> None:
    from mimo_jax.presets import PRESETS

    parser = commands.add_parser(
        "synthesize",
        help="write a checkpoint with random weights",
        description="Write a complete checkpoint with random weights in the release's exact layout.",
    )
    parser.add_argument("--preset", required=True, choices=sorted(PRESETS), help="size and shape")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.set_defaults(handler="mimo_jax.commands:synthesize")


def _quantize(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "quantize",
        help="write a checkpoint again with MXFP4 experts",
        description="Quantise the experts of a BF16 or FP8 checkpoint to MXFP4, in the release's layout and without "
        "calibration. All else is copied, drafter and tokenizer too. Takes little memory, whatever the size.",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder to read")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="appears when it is complete")
    parser.add_argument(
        "--linears",
        choices=("keep", "fp8"),
        default="keep",
        help="keep: plain linears stay as they are (default); fp8: those that are FP8 in the release (q, k, v and "
        "dense MLPs) become FP8 with 128x128 blocks",
    )
    parser.add_argument(
        "--qkv-layout",
        choices=("auto", "chunked", "canonical"),
        default="auto",
        help="row order of fused qkv weights, where the files do not prove it (default: auto)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.set_defaults(handler="mimo_jax.commands:quantize")


def _score(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "score",
        help="logits of given tokens",
        description="Write teacher-forced logits [batch, positions, vocab] (and hidden states) of given token ids.",
    )
    model_arguments(parser)
    parser.add_argument(
        "--ids", type=Path, required=True, metavar="FILE", help="JSON lists, or safetensors holding `input_ids`"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors")
    parser.add_argument(
        "--hidden-states",
        action="store_true",
        help="also `hidden_states` [layers + 1, batch, positions, hidden]: embeddings, then after each layer",
    )
    parser.add_argument("--chunk", type=positive, metavar="N", help="run through the caches, N positions at a time")
    parser.set_defaults(handler="mimo_jax.commands:score")


def _score_draft(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "score-draft",
        help="a drafter's block logits for given features",
        description="Write `logits` [batch, block, vocab] and `hidden` [batch, block, hidden] of a drafter's blocks.",
    )
    model_arguments(parser)
    parser.add_argument(
        "--features",
        type=Path,
        required=True,
        metavar="FILE",
        help="safetensors holding `features` [batch, context, captured layers * hidden] at positions 0 onward, "
        "`anchors` [batch] token ids and, if they do not stand right after the features, `positions` [batch]",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors")
    parser.set_defaults(handler="mimo_jax.commands:score_draft")


if __name__ == "__main__":
    sys.exit(main())
