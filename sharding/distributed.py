"""One model run by several processes: each executes the same program on the devices it has."""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

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


def agree(what: str, said: str) -> None:
    """Raise unless all processes say the same, which collectives over different work would hang for.

    Raises:
        HostsError: They do not.
    """
    sums = np.asarray(process_allgather(np.uint32(zlib.crc32(said.encode())))).reshape(-1)
    if (odd := np.flatnonzero(sums != sums[0])).size:
        raise HostsError(f"process 0 and process {odd[0]} were given different {what}")
