"""Arguments that several commands share, and what they stand for."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_jax.presets import NANO
from sharding.hosts import resolve

if TYPE_CHECKING:
    from mimo_jax.generate import Generator
    from mimo_jax.model import LoadOptions
    from sharding.topology import Topology


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
    group.add_argument(
        "--model",
        type=Path,
        default=NANO,
        metavar="DIR",
        help="checkpoint folder (default: the small model that comes with the package)",
    )
    group.add_argument(
        "--drafter", default="auto", metavar="DIR", help="drafter folder, or none (default: DIR/dflash if it exists)"
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of activations and caches (default: float32 on a CPU)"
    )
    loading_arguments(group)
    topology_arguments(parser)


def loading_arguments(group: argparse._ArgumentGroup) -> None:
    """How a checkpoint is read, where more than one way is right."""
    group.add_argument(
        "--storage",
        choices=("packed", "interleaved", "expanded"),
        help="of quantised weights in memory (default: interleaved for the kernel on a Hopper GPU; expanded on a CPU "
        "with room for it; else packed)",
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
    group.add_argument(
        "--snapshot",
        type=Path,
        metavar="DIR",
        help="restore the weights from there, or put them there for the next time if there are none",
    )


def device_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """Options of commands that plan for devices which need not be there."""
    parser.add_argument("--devices", required=True, metavar="COUNTxNAME", help=f"such as {example}")
    parser.add_argument(
        "--device-file", type=Path, metavar="FILE", help="more devices, in the form of the package's devices.json"
    )


def topology_arguments(parser: argparse.ArgumentParser, size: int | None = 1) -> None:
    """How a model is spread over devices, under the names that serving engines use.

    Args:
        parser: Of the command.
        size: Of what is not said; None leaves it to the command.
    """
    default = "" if size is None else f" (default: {size})"
    group = parser.add_argument_group("topology")
    group.add_argument(
        "--tensor-parallel-size",
        "--tp-size",
        "--tp",
        type=positive,
        default=size,
        metavar="N",
        help=f"devices in all{default}",
    )
    group.add_argument(
        "--data-parallel-size",
        "--dp-size",
        "--dp",
        type=positive,
        default=size,
        metavar="N",
        help=f"groups that attention splits sequences over{default}",
    )
    group.add_argument(
        "--expert-parallel-size",
        "--ep-size",
        "--ep",
        type=positive,
        default=size,
        metavar="N",
        help=f"parts of the set of experts; the devices left over slice every expert{default}",
    )
    group.add_argument("--enable-dp-attention", action="store_true", help="run attention once in every group")
    group.add_argument("--enable-dp-lm-head", action="store_true", help="cut the vocabulary within each group")
    group.add_argument(
        "--moe-dense-tp-size",
        type=positive,
        metavar="N",
        help="1: whole dense MLPs on every device (default: cut as attention is)",
    )


def host_arguments(parser: argparse.ArgumentParser) -> None:
    """Which processes run one model together, under the names that serving engines use."""
    group = parser.add_argument_group(
        "hosts",
        "One process a node runs the same command, and process 0 prints. Where nothing is said, the variables of "
        "LeaderWorkerSet, an Indexed Job, Slurm and torchrun are asked, in this order.",
    )
    group.add_argument(
        "--dist-init-addr", "--nccl-init-addr", metavar="HOST:PORT", help="process 0; the next port up is used, too"
    )
    group.add_argument("--nnodes", type=positive, metavar="N", help="how many processes; 1: this one alone")
    group.add_argument("--node-rank", type=int, metavar="I", help="this one's number, from 0")
    group.add_argument(
        "--dist-timeout", type=positive, default=300, metavar="S", help="seconds for all to come (default: 300)"
    )


@contextmanager
def hosts(arguments: argparse.Namespace) -> Iterator[None]:
    """Within, this process is one of the group that `host_arguments` and the environment describe, if any.

    To be entered before JAX is used at all. Of several processes, only process 0 writes to standard output.
    """
    group = None
    if "nnodes" in arguments:  # a command that has `host_arguments`
        group = resolve(arguments.dist_init_addr, arguments.nnodes, arguments.node_rank)
    if group is None:
        yield
        return
    from sharding.distributed import joined

    print(f"mimo-jax: {group}", file=sys.stderr)
    with (
        joined(group, arguments.dist_timeout),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere if group.process else sys.stdout),
    ):
        print(f"mimo-jax: all {group.processes} processes are there", file=sys.stderr)
        yield


def topology_of(arguments: argparse.Namespace) -> "Topology":
    """The topology that `topology_arguments` describe; raises `TopologyError` if its numbers cannot work together."""
    from sharding.topology import Topology

    return Topology(
        tensor_parallel=arguments.tensor_parallel_size,
        data_parallel=arguments.data_parallel_size,
        expert_parallel=arguments.expert_parallel_size,
        dp_attention=arguments.enable_dp_attention,
        dp_lm_head=arguments.enable_dp_lm_head,
        dense_tensor_parallel=arguments.moe_dense_tp_size,
    )


def load_options(arguments: argparse.Namespace) -> "LoadOptions":
    """What `model_arguments` say of loading."""
    from mimo_jax.model import LoadOptions  # only once there is something to do: help texts need no JAX

    return LoadOptions(
        drafter=arguments.drafter if arguments.drafter in ("auto", "none") else Path(arguments.drafter),
        dtype=arguments.dtype,
        storage=arguments.storage,
        swa_visible_keys=arguments.swa_visible_keys,
        router_dtype=arguments.router_dtype,
        qkv_layout=arguments.qkv_layout,
        draft_rope_theta=arguments.draft_rope_theta,
        topology=topology_of(arguments),
        snapshot=arguments.snapshot,
    )


def load_generator(arguments: argparse.Namespace) -> "Generator":
    """The model that `model_arguments` describe, with a progress bar."""
    from mimo_jax.generate import Generator

    return Generator.load(arguments.model, **vars(load_options(arguments)))


def output_file(path: Path) -> Path:
    """A path that can be written to; raises `ValueError` if its folder does not exist."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
    return path
