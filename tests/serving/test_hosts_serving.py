"""A server on two processes over a loopback network: the tokens of one process, and no hang when one dies."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import grpc
import pytest
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import SglangSchedulerStub

from mimo_jax import Generator, SamplingParams
from mimo_jax.synthesize import synthesize
from tests.checkpoint_files import MICRO

pytestmark = pytest.mark.slow

FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hosts") / "micro"
    synthesize(MICRO, out, seed=11)
    return out


def start(folder, address, rank, port, log, *more):
    command = [sys.executable, "-m", "serve.launch_server", "--model", str(folder), "--tp-size", "4", "--ep-size", "4"]
    command += ["--dp-size", "2", "--enable-dp-attention", "--enable-dp-lm-head", "--moe-dense-tp-size", "1"]
    command += ["--dist-init-addr", address, "--nnodes", "2", "--node-rank", str(rank), "--dist-timeout", "60"]
    command += ["--port", str(port), "--max-running-requests", "2", "--context-length", "256"]
    command += ["--chunked-prefill-size", "32", "--page-size", "16", "--device", "cpu", *more]
    with log.open("w") as out:
        return subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": FLAGS}, stdout=out, stderr=subprocess.STDOUT)


def test_two_processes_serve_as_one_and_end_together(folder, address, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    first, second = (start(folder, address, rank, port, logs[rank]) for rank in (0, 1))
    try:
        until = time.monotonic() + 400
        while "ready: " not in logs[0].read_text():
            assert first.poll() is None, logs[0].read_text()
            assert second.poll() is None, logs[1].read_text()
            assert time.monotonic() < until, logs[0].read_text()
            time.sleep(0.2)
        prompts = [[5, 6, 7, 8], [250, 17], list(range(40, 90))]
        settings = [SamplingParams(24, temperature=t, seed=9, ignore_eos=True) for t in (0.0, 1.0, 1.0)]

        async def ask() -> list[list[int]]:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

                async def one(number: int) -> list[int]:
                    sampling = pb.SamplingParams(
                        max_new_tokens=24, temperature=settings[number].temperature, ignore_eos=True
                    )
                    sampling.custom_params.update({"seed": 9})
                    tokenized = pb.TokenizedInput(input_ids=prompts[number])
                    asked = pb.GenerateRequest(request_id=str(number), tokenized=tokenized, sampling_params=sampling)
                    (answer,) = [r async for r in SglangSchedulerStub(channel).Generate(asked)]
                    return list(answer.complete.output_ids)

                return await asyncio.gather(*map(one, range(3)))

        given = asyncio.run(ask())
        alone = Generator.load(folder)
        expected = [alone.generate(p, s).token_ids for p, s in zip(prompts, settings, strict=True)]
        assert given == expected
        second.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        assert first.wait(30) != 0
        assert time.monotonic() - begun < 10
        assert "process 1" in logs[0].read_text()
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def test_processes_with_different_flags_are_refused(folder, address, tmp_path):
    """Programs of different sizes would wait for each other forever."""
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    more = [(), ("--page-size", "32")]
    both = [start(folder, address, rank, 0, logs[rank], *more[rank]) for rank in (0, 1)]
    try:
        assert all(process.wait(120) not in (0, None) for process in both)
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert any(
        "process 0 and process 1 were given different page_size: start every process with the same" in log.read_text()
        for log in logs
    ), [log.read_text() for log in logs]
    assert not any("loading" in log.read_text() for log in logs)
