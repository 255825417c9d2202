"""Which processes make one group: from what a person says, or from what the launcher put in the environment."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

DEFAULT_PORT = 20000
"""Of the first process, where a launcher names its host alone."""


class HostsError(ValueError):
    """What is said about the group is incomplete or contradicts itself."""


@dataclass(frozen=True)
class Group:
    """One process's place among those that run one model."""

    address: str
    """host:port of the first process; the next port up is used, too."""
    processes: int
    process: int
    """This one's number, from 0."""
    source: str
    """Where this was learnt, for people."""
    local_device: int | None = None
    """The only one of its host's devices that this process uses, where several processes share the host."""

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.processes:
            raise HostsError(
                f"{self.source}: process {self.process} of {self.processes}; numbers go from 0 to {self.processes - 1}"
            )
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65535:
            raise HostsError(f"{self.source}: {self.address!r} is no host:port with a port from 1 to 65534")

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes} at {self.address} (from {self.source})"


def resolve(
    address: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Group | None:
    """The group this process belongs to, None if it is alone.

    The first of these that speaks is believed, and no other is asked: the arguments; LeaderWorkerSet; an Indexed Job or
    JobSet, whose manifest names the coordinator and the number of nodes; Slurm; `MASTER_ADDR` as torchrun sets it.

    Args:
        address: host:port of process 0.
        processes: How many there are.
        process: This one's number.
        environment: Variables.

    Raises:
        HostsError: The source that speaks says too little, or what cannot be.
    """
    if (address, processes, process) != (None, None, None):
        return _from_arguments(address, processes, process)
    for speaks, read in _LAUNCHERS:
        if speaks in environment:
            return read(environment)
    return None


def _from_arguments(address: str | None, processes: int | None, process: int | None) -> Group | None:
    flags = {"--dist-init-addr": address, "--nnodes": processes, "--node-rank": process}
    if processes == 1 and not process:
        return None
    if address is None or processes is None or process is None:
        given = ", ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)
        lacking = " and ".join(flag for flag, value in flags.items() if value is None)
        raise HostsError(f"{given} without {lacking}: several nodes need all three")
    return Group(address, processes, process, "flags")


def _leader_worker_set(environment: Mapping[str, str]) -> Group | None:
    source = "LeaderWorkerSet"
    if (size := _number(environment, "LWS_GROUP_SIZE", source)) == 1:
        return None
    host = _text(environment, "LWS_LEADER_ADDRESS", source)
    return Group(f"{host}:{DEFAULT_PORT}", size, _number(environment, "LWS_WORKER_INDEX", source), source)


def _indexed_job(environment: Mapping[str, str]) -> Group | None:
    source = "Indexed Job"
    if (size := _number(environment, "NNODES", source)) == 1:
        return None
    address = _with_port(_text(environment, "JAX_COORDINATOR_ADDRESS", source))
    return Group(address, size, _number(environment, "JOB_COMPLETION_INDEX", source), source)


def _slurm(environment: Mapping[str, str]) -> Group | None:
    source = "Slurm"
    if (size := _number(environment, "SLURM_NTASKS", source)) == 1:
        return None
    nodes = _text(environment, "SLURM_STEP_NODELIST", source)
    # node3,other | node[003-015,020],other | node[003,007-009]-ib: the first name
    first = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    assert first is not None  # it matches nothing at all, if need be
    host = "".join(part or "" for part in first.groups())
    # jobs that share a node meet at ports of their own
    port = DEFAULT_PORT + _number(environment, "SLURM_JOB_ID", source) % 4096
    shared = size > _number(environment, "SLURM_STEP_NUM_NODES", source)
    local = _number(environment, "SLURM_LOCALID", source) if shared else None
    return Group(f"{host}:{port}", size, _number(environment, "SLURM_PROCID", source), source, local)


def _torchrun(environment: Mapping[str, str]) -> Group | None:
    source = "MASTER_ADDR"
    if (size := _number(environment, "WORLD_SIZE", source)) == 1:
        return None
    port = environment.get("MASTER_PORT", str(DEFAULT_PORT))
    shared = environment.get("LOCAL_WORLD_SIZE", "1") != "1"
    local = _number(environment, "LOCAL_RANK", source) if shared else None
    address = f"{_text(environment, 'MASTER_ADDR', source)}:{port}"
    return Group(address, size, _number(environment, "RANK", source), source, local)


_LAUNCHERS: tuple[tuple[str, Callable[[Mapping[str, str]], Group | None]], ...] = (
    ("LWS_GROUP_SIZE", _leader_worker_set),
    # every Indexed Job numbers its pods; that they are one group is said by the coordinator's address
    ("JAX_COORDINATOR_ADDRESS", _indexed_job),
    # set for every task of a step, not in a shell that only holds an allocation
    ("SLURM_STEP_NODELIST", _slurm),
    ("MASTER_ADDR", _torchrun),
)


def _text(environment: Mapping[str, str], name: str, source: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise HostsError(f"{source}: the variable {name} is not set; say --dist-init-addr, --nnodes and --node-rank")
    return value


def _number(environment: Mapping[str, str], name: str, source: str) -> int:
    value = _text(environment, name, source)
    if not value.isdecimal():
        raise HostsError(f"{source}: {name}={value!r} is no whole number")
    return int(value)


def _with_port(address: str) -> str:
    return address if ":" in address else f"{address}:{DEFAULT_PORT}"
