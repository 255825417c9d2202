"""Two processes over a loopback network run one model: the tokens of one process, and no hang when one fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mimo_jax.synthesize import synthesize

FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hosts") / "tiny"
    synthesize("tiny", out, seed=11)
    return out


def start(folder, devices, *arguments):
    command = ["generate", "--model", str(folder), "--tp-size", "4", "--ep-size", "4", "--json", *arguments]
    return subprocess.Popen(
        [sys.executable, "-m", "mimo_jax.cli", *command],
        env=os.environ | {"XLA_FLAGS": f"{FLAGS}{devices}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pair(folder, address, *arguments, second=()):
    common = ("--dist-init-addr", address, "--nnodes", "2", "--dist-timeout", "60", *arguments)
    return start(folder, 2, *common, "--node-rank", "0"), start(folder, 2, *common, "--node-rank", "1", *second)


def tokens(lines):
    # the CPU's collectives (Gloo) write on standard output, too, once they are connected
    return [json.loads(line).get("token_ids") for line in lines.splitlines() if line.startswith("{")]


GROUPS = ("--dp-size", "2", "--enable-dp-attention", "--enable-dp-lm-head", "--moe-dense-tp-size", "1")


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "more"), [("0", ()), ("1", ()), ("1", GROUPS)])
def test_two_processes_give_the_tokens_of_one(folder, address, temperature, more):
    asked = ("--prompt-ids", "[5, 6, 7, 8]", "--prompt-ids", "[300, 17]", "--max-new-tokens", "24", "--ignore-eos")
    asked = (*asked, "--temperature", temperature, *more)
    alone, errors = start(folder, 4, *asked).communicate(timeout=120)
    assert tokens(alone), errors
    (first, said), (second, _) = (one.communicate(timeout=120) for one in pair(folder, address, *asked))
    assert tokens(first) == tokens(alone)
    assert tokens(second) == [], "process 0 speaks for both"
    assert "process 0 of 2 at 127.0.0.1" in said
    assert "all 2 processes are there" in said


@pytest.mark.slow
def test_a_killed_process_ends_the_other_within_ten_seconds(folder, address):
    asked = ("--prompt-ids", "[5, 6, 7, 8]", "--max-new-tokens", "100000", "--ignore-eos")
    first, second = pair(folder, address, *asked)
    assert first.stderr is not None
    while "all 2 processes are there" not in (line := first.stderr.readline()):
        assert line, "it ended before the other came"
    time.sleep(10)  # amid loading, compiling or decoding, which of them does not matter
    assert first.poll() is None
    second.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    _, said = first.communicate(timeout=30)
    assert time.monotonic() - begun < 10
    assert first.returncode == 70
    assert "process 1 of 2 is gone" in said
    second.communicate(timeout=10)


@pytest.mark.slow
def test_different_prompts_are_refused(folder, address):
    asked = ("--prompt-ids", "[5, 6, 7, 8]")
    ended = [(one, one.communicate(timeout=120)[1]) for one in pair(folder, address, *asked, second=("--seed", "1"))]
    assert all(one.returncode != 0 for one, _ in ended)
    assert any("process 0 and process 1 were given different prompts or settings" in said for _, said in ended)
