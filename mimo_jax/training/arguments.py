"""Arguments of `mimo-jax train`."""

import argparse
from pathlib import Path
from typing import get_args

from mimo_jax.arguments import device_arguments, positive, topology_arguments
from mimo_jax.presets import NANO, PRESETS
from mimo_jax.training.arms import ARMS
from mimo_jax.training.block_losses import Loss


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand and its steps."""
    parser = commands.add_parser(
        "train",
        help="train a small backbone and its drafter",
        description="Train a small model of the family the release's way: corpus, backbone (with quantisation-aware "
        "training), export, regenerate (the model's own answers), drafter, export.",
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for add in (_corpus, _backbone, _regenerate, _drafter, _plan, _export, _ablate):
        add(steps)


def _corpus(steps: argparse._SubParsersAction) -> None:
    parser = steps.add_parser("corpus", help="make text and a tokenizer", description="Make a corpus folder.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--documents", type=positive, default=40_000, metavar="N", help="generated (default: 40000)")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], metavar="FILE", help="a document; instead of generated ones"
    )
    parser.add_argument(
        "--vocab-size", type=positive, default=2048, metavar="N", help="of the tokenizer (default: 2048)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(handler="mimo_jax.training.commands:train_corpus")


def _backbone(steps: argparse._SubParsersAction) -> None:
    parser = steps.add_parser(
        "backbone", help="pretrain a backbone", description="Pretrain a backbone; a run that was stopped goes on."
    )
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="from `mimo-jax train corpus`")
    parser.add_argument("--start-from", type=Path, metavar="RUN", help="begin with the parameters of another run")
    parser.add_argument("--qat", action="store_true", help="train the weights as they will be stored: MXFP4 and FP8")
    _run(parser, batch=8, length=512, steps=1000, rate=2e-3)
    parser.set_defaults(handler="mimo_jax.training.commands:train_backbone")


def _regenerate(steps: argparse._SubParsersAction) -> None:
    parser = steps.add_parser(
        "regenerate", help="let a model answer prompts", description="Answer generated prompts with the model itself."
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint that will be served")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines; goes on where it was")
    parser.add_argument("--prompts", type=positive, default=4000, metavar="N", help="default: 4000")
    parser.add_argument(
        "--context", type=int, default=0, metavar="N", help="tokens of conversation before an answer, at least"
    )
    parser.add_argument(
        "--reworded",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of conversations that ask in words of no generator: a drafter must follow its backbone there, too "
        "(default: 0.5)",
    )
    parser.add_argument("--batch", type=positive, default=32, metavar="N", help="default: 32")
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="default: 512")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: all (default)")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and samples (default: 1)")
    parser.set_defaults(handler="mimo_jax.training.commands:train_regenerate")


def _drafter(steps: argparse._SubParsersAction) -> None:
    parser = steps.add_parser(
        "drafter",
        help="train a drafter",
        description="Train a drafter on its backbone's answers; the backbone is frozen.",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the backbone's checkpoint folder")
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE", help="from `mimo-jax train regenerate`")
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="begin with this drafter, a checkpoint folder")
    parser.add_argument("--anchors", type=positive, default=512, metavar="N", help="blocks a step (default: 512)")
    parser.add_argument(
        "--loss",
        choices=get_args(Loss),
        default="hard",
        help="hard: against the answers' tokens (default); kd: against the backbone's distribution; d-pace: the "
        "tokens again, weighed by what a row adds to the accepted length",
    )
    parser.add_argument(
        "--gamma",
        type=float,
        default=7.0,
        help="decay of the weights in a block, but for d-pace (default: 7, the release's)",
    )
    parser.add_argument(
        "--edges",
        choices=("exchange", "skip"),
        default="exchange",
        help="with --cut-sequences, for anchors near the edge of a part: fetch their window from the neighbour "
        "(default), or draw none there, so that nothing is fetched",
    )
    _run(parser, batch=8, length=512, steps=1000, rate=2e-3)
    parser.set_defaults(handler="mimo_jax.training.commands:train_drafter")


def _plan(steps: argparse._SubParsersAction) -> None:
    parser = steps.add_parser(
        "plan",
        help="what a step of drafter training takes at a real size",
        description="Tell from shapes alone what every device holds in a step of drafter training, and the least time "
        "it can take. Needs neither the devices nor the weights. Without topology options, the model lies as in "
        "`mimo-jax plan`.",
    )
    parser.add_argument(
        "--preset", default="mimo-v2.5-pro", choices=sorted(PRESETS), help="size and shape (default: mimo-v2.5-pro)"
    )
    device_arguments(parser, "64xH200")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences a step (default: 1)")
    parser.add_argument("--length", type=positive, default=131072, metavar="N", help="of each (default: 131072)")
    parser.add_argument("--anchors", type=positive, default=4096, metavar="N", help="blocks a step (default: 4096)")
    parser.add_argument(
        "--whole-sequences", action="store_true", help="give each group sequences of its own, not parts of every one"
    )
    parser.add_argument("--edges", choices=("exchange", "skip"), default="exchange", help="as in `train drafter`")
    parser.add_argument(
        "--compile", action="store_true", help="also compile the step for as many devices of this machine's CPU"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    topology_arguments(parser, size=None)
    parser.set_defaults(handler="mimo_jax.training.commands:train_plan")


def _export(steps: argparse._SubParsersAction) -> None:
    parser = steps.add_parser(
        "export", help="write a checkpoint folder", description="Write a run's parameters in the release's layout."
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a drafter's belongs in MODEL/dflash")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="a backbone's, for its tokenizer")
    parser.add_argument("--plain", action="store_true", help="a backbone in bfloat16, not quantised")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.set_defaults(handler="mimo_jax.training.commands:train_export")


def _ablate(steps: argparse._SubParsersAction) -> None:
    parser = steps.add_parser(
        "ablate",
        help="what each choice in a drafter's training is worth",
        description="Train drafters that differ from a base in one choice each, all at the same cost, and compare the "
        "accepted lengths of greedy decoding, on held-out prompts of the same kinds and on the frozen ones. Goes on "
        "where it was; more seeds or arms are added to those that are done.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="answers, results, table, picture")
    parser.add_argument(
        "--model", type=Path, default=NANO, metavar="DIR", help="backbone and drafter (default: the one in the package)"
    )
    parser.add_argument(
        "--arm", action="append", choices=ARMS, metavar="NAME", help=f"of {', '.join(ARMS)} (default: all)"
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="of each arm (default: 3)")
    parser.add_argument("--steps", type=positive, default=100, metavar="N", help="of each seed (default: 100)")
    parser.add_argument("--batch", type=positive, default=4, metavar="N", help="rows a step (default: 4)")
    parser.add_argument("--length", type=positive, default=512, metavar="N", help="tokens a row (default: 512)")
    parser.add_argument("--anchors", type=positive, default=256, metavar="N", help="blocks a step (default: 256)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, metavar="X", help="peak (default: 0.002)")
    parser.add_argument("--prompts", type=positive, default=1000, metavar="N", help="to train on (default: 1000)")
    parser.add_argument("--held-out", type=positive, default=120, metavar="N", help="to measure with (default: 120)")
    parser.add_argument("--prompts-seed", type=int, default=1, help="of both (default: 1)")
    parser.set_defaults(handler="mimo_jax.training.ablation_command:train_ablate")


def _run(parser: argparse.ArgumentParser, *, batch: int, length: int, steps: int, rate: float) -> None:
    parser.add_argument("--preset", default="nano", choices=sorted(PRESETS), help="size and shape (default: nano)")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--steps", type=positive, default=steps, metavar="N", help=f"default: {steps}")
    parser.add_argument("--batch", type=positive, default=batch, metavar="N", help=f"rows a step (default: {batch})")
    parser.add_argument(
        "--length", type=positive, default=length, metavar="N", help=f"tokens a row (default: {length})"
    )
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="of matrices (default: muon)")
    parser.add_argument("--learning-rate", type=float, default=rate, metavar="X", help=f"peak (default: {rate:g})")
    parser.add_argument("--warmup", type=int, default=50, metavar="N", help="steps (default: 50)")
    parser.add_argument(
        "--final", type=float, default=0.1, metavar="X", help="share of the peak that the rate ends at (default: 0.1)"
    )
    parser.add_argument("--weight-decay", type=float, default=0.1, metavar="X", help="of matrices (default: 0.1)")
    parser.add_argument("--checkpoint-every", type=positive, default=100, metavar="N", help="steps (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cut-sequences",
        action="store_true",
        help="give every data-parallel group a part of each sequence, rather than sequences of its own",
    )
    topology_arguments(parser)
