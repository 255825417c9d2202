"""The `mimo-serve` command: a server, a client of one, or what serving costs."""

import importlib
import sys
from collections.abc import Sequence

_COMMANDS = {"chat": "serve.chat", "bench": "serve.bench", "overhead": "serve.overhead"}
_MORE = """clients of a running server:
  mimo-serve chat ...    talk to it
  mimo-serve bench ...   measure it
without one:
  mimo-serve overhead ...   measure what serving costs beyond decoding
(--help after each tells its own flags)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: its first word may be one of `_COMMANDS`; all else are flags of the server."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in _COMMANDS:
        return importlib.import_module(_COMMANDS[argv[0]]).main(argv[1:])
    if argv and not argv[0].startswith("-"):
        print(
            f"error: unknown command {argv[0]!r}; there are {', '.join(_COMMANDS)}, and without one a server starts",
            file=sys.stderr,
        )
        return 2
    from serve.launch_server import main as launch  # JAX takes a while to import

    return launch(argv, "mimo-serve", _MORE)
