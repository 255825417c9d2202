"""Arguments that several commands share, and what they stand for."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimo_jax.generate import Generator


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def positives(text: str) -> list[int]:
    """Whole numbers of at least 1, between commas."""
    return [positive(part.strip()) for part in text.split(",") if part.strip()]


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    group.add_argument(
        "--drafter", default="auto", metavar="DIR", help="drafter folder, or none (default: DIR/dflash if it exists)"
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of activations and caches (default: float32 on a CPU)"
    )
    group.add_argument(
        "--storage",
        choices=("packed", "expanded"),
        help="of quantised weights in memory (default: packed; expanded on a CPU with room for it)",
    )
    group.add_argument(
        "--swa-visible-keys",
        type=positive,
        metavar="N",
        help="keys a sliding-window query sees (default: sliding_window_size + 1, as SGLang; "
        "the Hugging Face code uses sliding_window_size)",
    )
    group.add_argument(
        "--router-dtype", choices=("float32", "bfloat16"), help="default: moe_router_dtype, else float32"
    )
    group.add_argument(
        "--qkv-layout",
        choices=("auto", "chunked", "canonical"),
        default="auto",
        help="row order of fused qkv weights, where the files do not prove it (default: auto)",
    )
    group.add_argument("--draft-rope-theta", type=float, metavar="BASE", help="replaces the drafter's rope_theta")


def load_generator(arguments: argparse.Namespace) -> "Generator":
    """The model that `model_arguments` describe, with a progress bar."""
    from mimo_jax.generate import Generator  # only once there is something to do: help texts need no JAX

    drafter = arguments.drafter if arguments.drafter in ("auto", "none") else Path(arguments.drafter)
    return Generator.load(
        arguments.model,
        drafter=drafter,
        dtype=arguments.dtype,
        storage=arguments.storage,
        swa_visible_keys=arguments.swa_visible_keys,
        router_dtype=arguments.router_dtype,
        qkv_layout=arguments.qkv_layout,
        draft_rope_theta=arguments.draft_rope_theta,
    )


def output_file(path: Path) -> Path:
    """A path that can be written to; raises `ValueError` if its folder does not exist."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
    return path
