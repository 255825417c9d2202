"""One engine on several processes: the first plans, and all run the same programs on the devices they have.

Every command goes to the other processes over a connection each, with its number and a checksum, before it is run here.
A process that finds one missing or changed fails, and with it the group: programs that differ would wait for each
other forever.
"""

import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state

from serve.engine.commands import Bucket, Command, all_buckets
from serve.engine.executor import Executor

_HEAD = struct.Struct("!QIIQ")
"""Number, checksum, bucket, bytes that follow."""
_END = 0xFFFFFFFF
_KEY = "mimo/commands"
_SECONDS = 1800
"""For all to have loaded the model, which starts together and need not end together."""


class DivergedError(RuntimeError):
    """A process was told something else than the first one does."""


class LeadingExecutor:
    """Runs commands here and on all other processes; what `Executor` is for one.

    Args:
        executor: Of this process.
        host: Under which the others reach this one.
    """

    def __init__(self, executor: Executor, host: str) -> None:
        self._executor = executor
        self.sizes, self.builder = executor.sizes, executor.builder
        self._numbers = {bucket: i for i, bucket in enumerate(all_buckets(executor.sizes))}
        self._next = 0
        with socket.create_server((host, 0)) as listener:
            listener.settimeout(_SECONDS)
            _store().key_value_set(_KEY, f"{host}:{listener.getsockname()[1]}")
            self._others = [listener.accept()[0] for _ in range(jax.process_count() - 1)]
        for other in self._others:
            other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self, command: Command) -> Any:
        """Dispatch a program everywhere."""
        leaves = jax.tree.leaves(command.arguments)
        self._tell(self._numbers[command.bucket], b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in leaves))
        return self._executor.run(command)

    def fetch(self, result: Any) -> Any:
        """A result on the host."""
        return self._executor.fetch(result)

    def start_profile(self, folder: Path) -> None:
        """Record what this process's devices do."""
        self._executor.start_profile(folder)

    def stop_profile(self) -> None:
        """Write it."""
        self._executor.stop_profile()

    def close(self) -> None:
        """Let the others end."""
        self._tell(_END, b"")
        for other in self._others:
            other.close()

    def _tell(self, bucket: int, body: bytes) -> None:
        head = _HEAD.pack(self._next, zlib.crc32(body), bucket, len(body))
        self._next += 1
        for other in self._others:
            other.sendall(head + body)


def follow(executor: Executor) -> None:
    """Run what the first process says, until it says that it ends.

    Raises:
        DivergedError: A command is missing or damaged.
        ConnectionError: The first process is gone.
    """
    address = _store().blocking_key_value_get(_KEY, _SECONDS * 1000)
    host, port = address.rsplit(":", 1)
    buckets, expected = all_buckets(executor.sizes), 0
    with socket.create_connection((host, int(port)), timeout=_SECONDS) as connection:
        connection.settimeout(None)
        stream = connection.makefile("rb")
        while True:
            number, checksum, bucket, length = _HEAD.unpack(_exactly(stream, _HEAD.size))
            body = _exactly(stream, length)
            if number != expected or zlib.crc32(body) != checksum:
                raise DivergedError(f"command {number} came where {expected} was due, or damaged: the processes differ")
            expected += 1
            if bucket == _END:
                return
            executor.run(_command(executor, buckets[bucket], body))


def _store() -> Any:
    """What the coordination service remembers for all processes."""
    return global_state.client


def _command(executor: Executor, bucket: Bucket, body: bytes) -> Command:
    template, at = executor.builder.template(bucket), 0

    def read(leaf: np.ndarray) -> np.ndarray:
        nonlocal at
        at += leaf.nbytes
        return np.frombuffer(body, leaf.dtype, leaf.size, at - leaf.nbytes).reshape(leaf.shape)

    return Command(bucket, jax.tree.map(read, template))


def _exactly(stream: Any, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ConnectionError("process 0 has gone")
    return data
