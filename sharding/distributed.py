"""One model run by several processes: each executes the same program on the devices it has."""

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from sharding.hosts import Group, HostsError
from sharding.rendezvous import end_process, gather

_SHUTDOWN_SECONDS = 10


@contextmanager
def joined(group: Group, timeout: float) -> Iterator[None]:
    """Within, JAX sees the devices of all processes of a group. To be entered before JAX is used at all.

    When a process fails within, or dies, the others end at once with a message: they could only wait for it.

    Args:
        group: Of this process.
        timeout: Seconds within which all must have come.

    Raises:
        HostsError: Some did not come, or could not be reached.
    """
    peers = gather(group, timeout)
    peers.watch(end_process)
    try:
        jax.distributed.initialize(
            group.address,
            group.processes,
            group.process,
            local_device_ids=group.local_device,
            initialization_timeout=math.ceil(timeout),
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
        yield
    except BaseException:
        peers.abandon()
        raise
    peers.leave()


def agree(said: Mapping[str, Any]) -> None:
    """Raise unless all processes say the same, which collectives over different work would hang for.

    Args:
        said: By the name of what it is about; compared as `repr` shows it.

    Raises:
        HostsError: They do not; the message has the first name that they say something else of.
    """
    sums = np.asarray([zlib.crc32(repr(value).encode()) for value in said.values()], np.uint32)
    everywhere = np.asarray(process_allgather(sums)).reshape(-1, len(said))
    for process, what in np.argwhere(everywhere != everywhere[0]).tolist():
        raise HostsError(
            f"process 0 and process {process} were given different {list(said)[what]}: start every process with the "
            "same model and the same flags"
        )


def least(value: int) -> int:
    """The smallest of what all processes say, any that 64 bits hold."""
    words = np.asarray([value], np.int64).view(np.uint32)  # JAX would cut it to 32 bits
    everywhere = np.asarray(process_allgather(words)).reshape(-1, 2)
    return int(np.ascontiguousarray(everywhere).view(np.int64).min())
