"""Which processes make one group: every launcher's variables, their order, and what is refused."""

import pytest

from sharding.hosts import Group, HostsError, resolve

LWS = {"LWS_LEADER_ADDRESS": "leader.svc", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
JOB = {"JAX_COORDINATOR_ADDRESS": "job-0.svc", "NNODES": "4", "JOB_COMPLETION_INDEX": "3"}
SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "gpu[007-008,012],extra",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
TORCHRUN = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "group"),
    [
        (LWS, Group("leader.svc:20000", 2, 1, "LeaderWorkerSet")),
        (JOB, Group("job-0.svc:20000", 4, 3, "Indexed Job")),
        (JOB | {"JAX_COORDINATOR_ADDRESS": "job-0.svc:1234"}, Group("job-0.svc:1234", 4, 3, "Indexed Job")),
        (SLURM, Group("gpu007:20003", 4, 2, "Slurm")),
        (SLURM | {"SLURM_STEP_NODELIST": "n1"}, Group("n1:20003", 4, 2, "Slurm")),
        (SLURM | {"SLURM_STEP_NODELIST": "n1,n2"}, Group("n1:20003", 4, 2, "Slurm")),
        (SLURM | {"SLURM_STEP_NODELIST": "r[03,05-07]-ib,n2"}, Group("r03-ib:20003", 4, 2, "Slurm")),
        # several tasks on a node take a device each
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}, Group("gpu007:20003", 4, 2, "Slurm", 1)),
        (TORCHRUN, Group("10.0.0.1:29500", 2, 0, "MASTER_ADDR")),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5"}, Group("10.0.0.1:29500", 2, 0, "MASTER_ADDR", 5)),
        (LWS | {"LWS_GROUP_SIZE": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None),  # an allocation, not a task of it
        ({"JOB_COMPLETION_INDEX": "3"}, None),  # pods of their own
        ({}, None),
    ],
)
def test_launchers(variables, group):
    assert resolve(environment=variables) == group


def test_the_first_that_speaks_is_believed():
    order = (LWS, JOB, SLURM, TORCHRUN)
    for i, one in enumerate(order):
        later = {name: value for other in order[i:] for name, value in other.items()}
        assert resolve(environment=later) == resolve(environment=one)
    everything = {name: value for one in order for name, value in one.items()}
    assert resolve("host:1", 3, 2, everything) == Group("host:1", 3, 2, "flags")
    assert resolve(processes=1, environment=everything) is None
    alone = LWS | {"LWS_GROUP_SIZE": "1"}
    assert resolve(environment=TORCHRUN | alone) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("host:1", 2, None), "--dist-init-addr host:1, --nnodes 2 without --node-rank"),
        ((None, 2, 0), "without --dist-init-addr"),
        ((None, None, 1), "--node-rank 1 without --dist-init-addr and --nnodes"),
        (("host:1", 2, 2), "process 2 of 2; numbers go from 0 to 1"),
        (("host:1", 1, 1), "process 1 of 1"),
        (("host", 2, 0), "'host' is no host:port"),
        (("host:99999", 2, 0), "is no host:port"),
        (("host:65535", 2, 0), "a port from 1 to 65534"),
        ((":1", 2, 0), "is no host:port"),
    ],
)
def test_arguments_that_cannot_be(arguments, said):
    with pytest.raises(HostsError, match=said):
        resolve(*arguments, environment=LWS)


@pytest.mark.parametrize("variables", [LWS, JOB, SLURM, TORCHRUN])
def test_every_variable_that_lacks_or_is_wrong_is_named(variables):
    for name in variables:
        if name in ("LWS_GROUP_SIZE", "JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "MASTER_ADDR"):
            continue  # without it, this launcher does not speak
        if name in ("MASTER_PORT", "SLURM_LOCALID"):
            continue  # not always needed
        lacking = {other: value for other, value in variables.items() if other != name}
        with pytest.raises(HostsError, match=f"variable {name} is not set"):
            resolve(environment=lacking)
        if name != "LWS_LEADER_ADDRESS":
            with pytest.raises(HostsError, match=f"{name}='x' is no whole number"):
                resolve(environment=variables | {name: "x"})


def test_a_group_says_where_it_comes_from():
    assert str(resolve(environment=SLURM)) == "process 2 of 4 at gpu007:20003 (from Slurm)"
