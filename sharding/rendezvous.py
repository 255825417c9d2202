"""Processes of a group meet before they compute together, and notice at once when one of them is gone.

JAX's runtime ends a process that waited in vain with a stack trace, and takes minutes to notice a peer that died. Here
process 0 listens one port above the group's address; the others call, and the connections stay open. The kernel closes
the connection of a process that dies, and gives one up whose machine is gone.
"""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from sharding.hosts import Group, HostsError

_ALL_HERE, _DONE = "all here", "done"
_CALL = re.compile(r"(\d+) of (\d+)")
# an unanswered connection is given up after 2 + 3 x 2 seconds
_KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 8000}
_LONGEST_LINE = 4096


@dataclass
class Peers:
    """Open connections to the others: of process 0 to all, of every other to process 0."""

    group: Group
    lines: dict[int, "_Line"]
    left: set[int] = field(default_factory=set)
    """To whom nothing more is said: they have left, or this process has."""

    def watch(self, lost: Callable[[str], None]) -> None:
        """Call `lost` with a sentence, once and from a thread, when a process is gone that did not say `leave`.

        Process 0 tells the others before it is called itself.
        """
        once = threading.Lock()

        def listen(process: int, line: _Line) -> None:
            said = line.hear()
            if said == _DONE or process in self.left:
                self.left.add(process)
                return
            if not once.acquire(blocking=False):
                return
            reason = said or f"process {process} of {self.group.processes} is gone"
            for other in self.lines.keys() - self.left - {process}:
                self.lines[other].say(reason)
            lost(reason)

        for process, line in self.lines.items():
            threading.Thread(target=listen, args=(process, line), daemon=True, name=f"peer {process}").start()

    def leave(self) -> None:
        """Say to the others that this process ends as it should."""
        for line in self.lines.values():
            line.say(_DONE)
        self.abandon()

    def abandon(self) -> None:
        """Hang up; others that are still there take this process for gone."""
        for process, line in self.lines.items():
            self.left.add(process)
            line.close()


def gather(group: Group, timeout: float) -> Peers:
    """Wait until all processes of a group are there.

    Args:
        group: Of this process.
        timeout: Seconds.

    Raises:
        HostsError: Some did not come in time, or process 0 cannot be reached or cannot listen.
    """
    deadline = time.monotonic() + timeout
    host, _, port = group.address.rpartition(":")
    host, meeting = host.strip("[]"), int(port) + 1
    if group.process == 0:
        return _gather_all(group, meeting, deadline, timeout)
    return _call(group, host, meeting, deadline, timeout)


def end_process(reason: str) -> None:
    """Print why, and end this process where it stands: it may be inside a collective that will never finish."""
    print(f"mimo-jax: {reason}; ending this process", file=sys.stderr, flush=True)
    os._exit(70)


def _gather_all(group: Group, port: int, deadline: float, timeout: float) -> Peers:
    lines: dict[int, _Line] = {}

    def refuse(reason: str, *strangers: _Line) -> HostsError:
        for line in (*strangers, *lines.values()):
            line.say(f"{group}: {reason}")
            line.close()
        return HostsError(f"{group}: {reason}")

    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise HostsError(f"{group}: cannot listen on port {port}: {error.strerror}") from None
    with server:
        while len(lines) < group.processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                line = _Line(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, group.processes) if i not in lines)
                raise refuse(f"after {timeout:g} s, processes that have not come: {missing}") from None
            said = line.hear(within=5.0) or ""
            if not (called := _CALL.fullmatch(said)):
                line.close()  # a port scan, or a probe
                continue
            process, processes = map(int, called.groups())
            if process in lines:
                raise refuse(f"a process came that says it is {said}, twice", line)
            if processes != group.processes or not 0 < process < processes:
                raise refuse(f"a process came that says it is {said}", line)
            lines[process] = line
    for line in lines.values():
        line.say(_ALL_HERE)
    return Peers(group, lines)


def _call(group: Group, host: str, port: int, deadline: float, timeout: float) -> Peers:
    while True:
        try:
            line = _Line(socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001)))
            break
        except OSError as error:
            if time.monotonic() + 0.1 > deadline:
                raise HostsError(
                    f"{group}: process 0 was not to be reached at {host}:{port} within {timeout:g} s "
                    f"({error.strerror or error}); is it running, and is the port open between the nodes?"
                ) from None
            time.sleep(0.1)
    line.say(f"{group.process} of {group.processes}")
    # process 0 gives up by itself; its reason takes a moment to arrive
    said = line.hear(within=max(deadline - time.monotonic(), 0) + 5.0)
    if said != _ALL_HERE:
        line.close()
        raise HostsError(said or f"{group}: process 0 is gone")
    return Peers(group, {0: line})


class _Line:
    """Sentences over a connection, one a line."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._heard = b""

    def say(self, sentence: str) -> None:
        """Send; who is gone does not hear it."""
        with suppress(OSError):
            self._connection.sendall(f"{sentence}\n".encode())

    def hear(self, within: float | None = None) -> str | None:
        """The next sentence; None if the other is gone, or says nothing sensible within so many seconds."""
        with suppress(OSError):
            self._connection.settimeout(within)
            while b"\n" not in self._heard and len(self._heard) < _LONGEST_LINE:
                more = self._connection.recv(_LONGEST_LINE)
                if not more:
                    return None
                self._heard += more
        sentence, end, self._heard = self._heard.partition(b"\n")
        return sentence.decode(errors="replace") if end else None

    def close(self) -> None:
        """Hang up; a thread that hears here hears no more."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
