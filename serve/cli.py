"""The `mimo-serve` command: a server, or a client of one."""

import importlib
import sys
from collections.abc import Sequence

_CLIENTS = {"chat": "serve.chat", "bench": "serve.bench"}
_MORE = """clients of a running server:
  mimo-serve chat ...    talk to it
  mimo-serve bench ...   measure it
(--help after either tells its own flags)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: `chat` and `bench` are clients; all else are flags of the server."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in _CLIENTS:
        return importlib.import_module(_CLIENTS[argv[0]]).main(argv[1:])
    if argv and not argv[0].startswith("-"):
        print(
            f"error: unknown command {argv[0]!r}; there are {' and '.join(_CLIENTS)}, and without one a server starts",
            file=sys.stderr,
        )
        return 2
    from serve.launch_server import main as launch  # JAX takes a while to import

    return launch(argv, "mimo-serve", _MORE)
