"""How clients reach a server: their flags, the channel, and the key in the metadata of calls. Imports no JAX."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

MAX_MESSAGE_BYTES = 256 << 20
"""Of one message, either way."""


def connection_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where a server is, and what it takes to be let in; gives their group."""
    server = parser.add_argument_group("server")
    server.add_argument("--address", default="127.0.0.1:30000", metavar="HOST:PORT", help="default: 127.0.0.1:30000")
    server.add_argument(
        "--api-key", default=os.environ.get("MIMO_API_KEY"), metavar="KEY", help="default: MIMO_API_KEY, if it is set"
    )
    server.add_argument("--ca-file", type=Path, metavar="FILE", help="use TLS, and trust these authorities (PEM)")
    server.add_argument("--connect-timeout", type=above_zero, default=10.0, metavar="S", help="seconds (default: 10)")
    return server


def above_zero(text: str) -> float:
    """A number above 0, and no astronomic one."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def open_channel(library: Any, address: str, ca_file: Path | None) -> Any:
    """A channel of `grpc` or of `grpc.aio`; over TLS if a file of authorities is given.

    Raises:
        OSError: The file cannot be read.
    """
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    if ca_file is None:
        return library.insecure_channel(address, options=options)
    return library.secure_channel(address, grpc.ssl_channel_credentials(ca_file.read_bytes()), options=options)


def key_metadata(api_key: str | None) -> Sequence[tuple[str, str]]:
    """The metadata of calls that bring a key."""
    return [("authorization", f"Bearer {api_key}")] if api_key else []
