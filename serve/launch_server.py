"""`python -m serve.launch_server`: flags in, a server out. The same command runs on every node."""

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence

import jax

from mimo_jax.checkpoint import BackboneCheckpoint, DrafterCheckpoint
from mimo_jax.compilation_cache import keep_programs
from mimo_jax.config import BackboneConfig, DrafterConfig
from mimo_jax.exit_status import exit_status
from serve import logs
from serve.flag_kinds import FlagError
from serve.flags import parse
from serve.options import ServerOptions
from serve.resolution import ALLOCATOR_FRACTION, ALLOCATOR_VARIABLE, resolve

logger = logging.getLogger("serve.launch_server")  # also where this file is the main module


def main(argv: Sequence[str] | None = None, program: str = "python -m serve.launch_server", more: str = "") -> int:
    """Serve until told to end; the exit status is 0, 2 for what the person can mend, 1 for a fault of ours.

    Args:
        argv: Flags; default: the process's.
        program: What the person typed, for the help.
        more: The last paragraph of the help.
    """
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv, program, more)
    except FlagError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = exit_status(lambda: _launch(arguments), arguments.log_level == "debug")
    if status == 1:
        print("This is a fault of mimo-jax; --log-level debug shows the traceback.", file=sys.stderr)
    return status


def _launch(arguments: argparse.Namespace) -> int:
    options = resolve(arguments, weights=not arguments.dry_run)
    logs.configure(
        level=getattr(logging, options.log_level.upper()),
        json_lines=options.log_format == "json",
        rank=options.process if options.group else None,
    )
    for note in arguments.notes:
        logger.warning("%s", note)
    if arguments.dry_run:
        logger.info("%s", _checked(options))
        print(json.dumps(options.as_json(), indent=2))
        return 0
    if arguments.device is not None:
        jax.config.update("jax_platforms", arguments.device)
    # read when JAX starts, which is after this
    os.environ.setdefault(ALLOCATOR_VARIABLE, str(ALLOCATOR_FRACTION))
    keep_programs(options.platform)
    return importlib.import_module("serve.server").run(options)


def _checked(options: ServerOptions) -> str:
    """Prove the weight files complete by their headers, where there are any; what was found."""
    names = ("model.safetensors.index.json", "model.safetensors")
    if not any((options.model / name).exists() for name in names):
        return f"{options.model} holds no weights: configurations alone were checked"
    load = options.load
    config = BackboneConfig.from_folder(options.model)
    nbytes = BackboneCheckpoint(options.model, config, load.qkv_layout).total_bytes
    if options.drafter is not None:
        nbytes += DrafterCheckpoint(options.drafter, DrafterConfig.from_folder(options.drafter)).total_bytes
    return f"{nbytes:,} bytes of weights, complete by their headers"


if __name__ == "__main__":
    sys.exit(main())
