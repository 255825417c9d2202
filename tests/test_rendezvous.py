"""Processes that meet: all there, some missing, strangers, and one that dies."""

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sharding.hosts import Group, HostsError
from sharding.rendezvous import gather

MEMBER = """
import sys, time
from sharding.hosts import Group
from sharding.rendezvous import end_process, gather
address, n, process, seconds = sys.argv[1], *map(int, sys.argv[2:])
peers = gather(Group(address, n, process, "flags"), timeout=20)
peers.watch(end_process)
print("here", flush=True)
time.sleep(seconds)
peers.leave()
"""


def members(address, count, seconds):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, address, str(count), str(i), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    for member in started:
        assert member.stdout is not None
        assert member.stdout.readline() == "here\n"
    return started


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_with_a_message(address, killed):
    group = members(address, 3, 60)
    begun = time.monotonic()
    group[killed].send_signal(signal.SIGKILL)
    ended = [member.communicate(timeout=10)[1] for member in group]
    assert time.monotonic() - begun < 10
    for i, member in enumerate(group):
        if i != killed:
            assert member.returncode == 70
            assert f"process {killed} of 3 is gone" in ended[i]


def test_leaving_ends_nobody(address):
    for member in members(address, 3, 1):
        assert member.communicate(timeout=10)[1] == ""
        assert member.returncode == 0


def test_some_who_do_not_come_are_named_to_all_who_did(address):
    with ThreadPoolExecutor() as pool:
        came = [pool.submit(gather, Group(address, 4, i, "flags"), 1.0) for i in (0, 2)]
        for one in came:
            with pytest.raises(HostsError, match=r"after 1 s, processes that have not come: 1, 3$"):
                one.result()


def test_nobody_to_call(address):
    begun = time.monotonic()
    with pytest.raises(HostsError, match=r"process 0 was not to be reached at 127.0.0.1:.* within 0.5 s"):
        gather(Group(address, 2, 1, "flags"), 0.5)
    assert time.monotonic() - begun < 3


def test_a_port_that_is_taken(address):
    port = int(address.rpartition(":")[2])
    with socket.create_server(("", port + 1)), pytest.raises(HostsError, match=f"cannot listen on port {port + 1}"):
        gather(Group(address, 2, 0, "flags"), 1.0)


@pytest.mark.parametrize(
    ("others", "said"), [([(2, 3)], "says it is 2 of 3$"), ([(1, 4), (1, 4)], "says it is 1 of 4, twice$")]
)
def test_groups_that_disagree(address, others, said):
    with ThreadPoolExecutor() as pool:
        came = [pool.submit(gather, Group(address, 4, 0, "flags"), 5.0)]
        came += [pool.submit(gather, Group(address, of, process, "flags"), 5.0) for process, of in others]
        for one in came:
            with pytest.raises(HostsError, match=said):
                one.result()


def test_strangers_are_not_counted(address):
    host, _, port = address.rpartition(":")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(gather, Group(address, 2, 0, "flags"), 10.0)
        for _ in range(100):
            try:
                with socket.create_connection((host, int(port) + 1)) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                break
            except OSError:
                time.sleep(0.05)
        second = pool.submit(gather, Group(address, 2, 1, "flags"), 10.0)
        here = first.result(), second.result()
        assert [list(peers.lines) for peers in here] == [[1], [0]]
        for peers in here:
            peers.leave()
