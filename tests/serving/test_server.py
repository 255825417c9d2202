"""The server as a process: started by its command, called by a gateway and the clients people use, ended by signals."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import SglangSchedulerStub

from mimo_jax import Generator, SamplingParams
from mimo_jax.synthesize import synthesize
from serve.protos.mimo.serve.v1 import generation_pb2
from serve.protos.mimo.serve.v1.generation_pb2_grpc import GenerationStub
from tests.checkpoint_files import MICRO

pytestmark = pytest.mark.slow

FAST = ("--max-running-requests", "4", "--context-length", "1024", "--chunked-prefill-size", "64")
ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}  # compiled well: it runs for long


class Server:
    """A server process, and where it listens."""

    def __init__(self, folder: Path, *flags: str, port: int | None = None) -> None:
        self.log = folder / f"server-{time.monotonic_ns()}.log"
        self.grpc_port = port or _free_port()
        command = [sys.executable, "-m", "serve.launch_server", "--port", str(self.grpc_port), *FAST, *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)

    def wait_until(self, words: str, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)

    def http(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.grpc_port + 1}{path}") as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        _, text = self.http("/metrics")
        return sum(float(v) for v in re.findall(rf"^mimo:{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))

    def stub(self, channel: grpc.aio.Channel) -> SglangSchedulerStub:
        return SglangSchedulerStub(channel)


def _free_port() -> int:
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + 1)):
                return port


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.wait_until("ready: nano")
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[str, ...]:
    """Flags of a server that is up soon, where it matters how one lives and not what it says."""
    folder = tmp_path_factory.mktemp("model") / "micro"
    synthesize(MICRO, folder, seed=0)
    return "--model", str(folder), "--served-model-name", "micro", "--disable-precompile"


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory) -> Iterator[openai.OpenAI]:
    """OpenAI's client on the gateway on the server."""
    port, log = _free_port(), tmp_path_factory.mktemp("gateway") / "gateway.log"
    gateway = [str(Path(sys.executable).with_name("smg")), "launch", "--host", "127.0.0.1", "--port", str(port)]
    gateway += ["--worker-urls", f"grpc://127.0.0.1:{server.grpc_port}", "--shutdown-grace-period-secs", "1"]
    gateway += ["--reasoning-parser", "qwen3", "--tool-call-parser", "qwen_xml", "--disable-retries"]
    gateway += ["--prometheus-port", str(_free_port())]
    with log.open("w") as out:
        process = subprocess.Popen(gateway, stdout=out, stderr=subprocess.STDOUT)
    made = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    until = time.monotonic() + 60
    while True:
        with contextlib.suppress(openai.OpenAIError):
            if made.models.list().data:
                break
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)
    yield made
    process.kill()
    process.wait()


NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}  # else the gateway takes all it gets for thoughts
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def test_a_chat_is_answered_as_without_a_server(client):
    answer = client.chat.completions.create(model="nano", messages=QUESTION, max_tokens=60, temperature=0)
    offline = Generator.load().chat(QUESTION, SamplingParams(max_new_tokens=60))
    assert answer.choices[0].message.content == re.sub("<think>.*</think>", "", offline.text, flags=re.DOTALL)
    assert answer.choices[0].finish_reason == offline.finish_reason == "stop"
    used = answer.usage.completion_tokens_details
    assert used.accepted_prediction_tokens + used.rejected_prediction_tokens == 7 * offline.stats.rounds
    pieces = client.chat.completions.create(model="nano", messages=QUESTION, max_tokens=60, temperature=0, stream=True)
    streamed = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert streamed == answer.choices[0].message.content


def test_completions_with_samples_and_log_probabilities(client):
    answer = client.completions.create(
        model="nano", prompt="def add(a, b):", max_tokens=12, n=3, temperature=1.0, logprobs=2
    )
    assert len(answer.choices) == 3
    assert answer.usage.completion_tokens <= 36
    chat = client.chat.completions.create(
        model="nano", messages=QUESTION, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    tokens = chat.choices[0].logprobs.content
    assert all(t.logprob <= 0 and len(t.top_logprobs) == 3 for t in tokens)
    assert all(t.top_logprobs[0].logprob == pytest.approx(t.logprob, abs=1e-4) for t in tokens)  # greedy


def test_structured_output_keeps_to_its_schema(client):
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["cat", "dog"]}},
        "required": ["age", "kind"],
        "additionalProperties": False,
    }
    for temperature in (0, 1):
        answer = client.chat.completions.create(
            model="nano",
            messages=[{"role": "user", "content": "Describe a pet."}],
            max_tokens=300,
            temperature=temperature,
            response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}},
            extra_body=NO_THINKING,
        )
        assert answer.choices[0].finish_reason == "stop"
        pet = json.loads(answer.choices[0].message.content)
        assert 0 <= pet["age"] <= 99
        assert pet["kind"] in ("cat", "dog")


def test_tools_that_must_be_called_are(client):
    tool: Any = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    answer = client.chat.completions.create(
        model="nano",
        messages=QUESTION,
        max_tokens=100,
        temperature=0,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        extra_body=NO_THINKING,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(model="nano", messages=QUESTION, max_tokens=10**6)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="nano", prompt="x", max_tokens=4, temperature=0, extra_body={"regex": "("})


async def test_a_mixed_crowd_leaves_nothing_behind_and_compiles_nothing(server):
    """Two thousand requests: short, long, cancelled, constrained, sampled and bad."""
    import random

    rng = random.Random(0)
    ends: dict[str, int] = {}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub, gate = server.stub(channel), asyncio.Semaphore(16)  # with two samples each, as many as may be inside

        async def one(number: int) -> None:
            kind = rng.choice(["short", "short", "short", "long", "cancelled", "constrained", "sampled", "bad"])
            length = rng.choice([1, 5, 30]) if kind != "long" else 200
            asked = pb.GenerateRequest(
                request_id=f"soak-{number}",
                tokenized=pb.TokenizedInput(input_ids=[rng.randrange(256) for _ in range(length)]),
                sampling_params=pb.SamplingParams(
                    max_new_tokens=rng.choice([1, 2, 6]) if kind != "long" else 24,
                    temperature=1.0 if kind in ("sampled", "constrained") else 0.0,
                    top_p=0.9,
                    n=rng.choice([1, 1, 1, 2]),
                ),
                stream=rng.random() < 0.5,
            )
            if kind == "constrained":
                asked.sampling_params.regex = "[a-z]{1,5}"
            if kind == "bad":
                asked.sampling_params.top_p = -1
            if kind == "cancelled":
                asked.sampling_params.max_new_tokens = 500
                asked.stream = True
            async with gate:
                call = stub.Generate(asked)
                try:
                    async with asyncio.timeout(120):
                        if kind == "cancelled":
                            await asyncio.sleep(rng.random() * 0.1)
                            call.cancel()
                        last = None
                        async for response in call:
                            last = response
                        end = last.complete.finish_reason if last else "nothing"
                except grpc.aio.AioRpcError as error:
                    end = error.code().name
                except asyncio.CancelledError:
                    assert kind == "cancelled"
                    end = "CANCELLED"
            ends[f"{kind}: {end}"] = ends.get(f"{kind}: {end}", 0) + 1

        await asyncio.gather(*map(one, range(2000)))
    assert sum(ends.values()) == 2000
    assert all(e.split(": ")[1] in ("stop", "length") for e in ends if e.split(":")[0] not in ("bad", "cancelled")), (
        ends
    )
    assert sum(n for e, n in ends.items() if e.startswith("bad")) == ends["bad: INVALID_ARGUMENT"]
    until = time.monotonic() + 10
    while server.metric("num_running_reqs") + server.metric("num_queue_reqs") and time.monotonic() < until:
        await asyncio.sleep(0.1)
    _, shown = server.http("/info")
    load = json.loads(shown)["load"]
    assert (load["running"], load["waiting"], load["used_tokens"]) == (0, 0, 0)
    assert "compiled while serving" not in server.log.read_text()
    assert server.http("/ready") == (200, "ready\n")


def test_a_client_without_stubs_is_answered(server):
    """grpc_requests knows of the services what reflection tells."""
    from grpc_requests import Client

    client: Any = Client.get_by_endpoint(f"127.0.0.1:{server.grpc_port}")
    try:
        text, tokens = "mimo.serve.v1.Generation", "sglang.grpc.scheduler.SglangScheduler"
        assert {text, tokens, "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(client.service_names)
        asked = {"text": {"text": "def add(a, b):"}, "sampling": {"max_new_tokens": 12, "temperature": 0}}
        whole = client.request(text, "Complete", asked)
        streamed = list(client.request(text, "Generate", asked))
        said = "".join(part.get(kind, {}).get("text", "") for part in streamed for kind in ("round", "finished"))
        offline = Generator.load().generate("def add(a, b):", SamplingParams(max_new_tokens=12))
        assert said == whole["samples"][0]["text"] == offline.text
        assert client.request(tokens, "HealthCheck", {})["healthy"]
    finally:
        client.channel.close()


def test_killed_under_load_its_clients_know_at_once_and_another_takes_its_place(tmp_path, quick):
    server = Server(tmp_path, *quick)
    server.wait_until("ready: micro")

    async def ended() -> tuple[list[str], float]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            begun = 0.0

            async def one(number: int) -> str:
                call = server.stub(channel).Generate(
                    pb.GenerateRequest(
                        request_id=f"k{number}",
                        tokenized=pb.TokenizedInput(input_ids=[70, 71, 72]),
                        sampling_params=pb.SamplingParams(max_new_tokens=900, ignore_eos=True),
                        stream=True,
                    )
                )
                try:
                    async for _ in call:
                        first.set()
                except grpc.aio.AioRpcError as error:
                    return error.code().name
                return "OK"

            first = asyncio.Event()
            calls = [asyncio.create_task(one(i)) for i in range(12)]  # some run, most wait
            await asyncio.wait_for(first.wait(), 300)
            begun = time.monotonic()
            server.process.kill()
            return await asyncio.wait_for(asyncio.gather(*calls), 30), time.monotonic() - begun

    try:
        codes, seconds = asyncio.run(ended())
    finally:
        server.process.kill()
    assert codes == ["UNAVAILABLE"] * 12
    assert seconds < 5
    assert server.process.wait(10) == -signal.SIGKILL
    again = Server(tmp_path, *quick, port=server.grpc_port)
    try:
        again.wait_until("ready: micro")

        async def ask() -> str:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{again.grpc_port}") as channel:
                asked = pb.GenerateRequest(
                    request_id="next",
                    tokenized=pb.TokenizedInput(input_ids=[70, 71]),
                    sampling_params=pb.SamplingParams(max_new_tokens=3, ignore_eos=True),
                )
                (answer,) = [r async for r in again.stub(channel).Generate(asked)]
                return answer.complete.finish_reason

        assert asyncio.run(ask()) == "length"
    finally:
        again.process.kill()
        again.process.wait()


def test_drained_it_stays_until_it_is_told_to_end(tmp_path, quick):
    """An open watch does not hold it up."""
    server = Server(tmp_path, *quick)
    server.wait_until("ready: micro")
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

    async def scenario() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            health: Any = HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == serving
            assert (await GenerationStub(channel).Drain(generation_pb2.DrainRequest(timeout_seconds=5))).clean
            assert (await watch.read()).status == not_serving
            info = await GenerationStub(channel).GetServerInfo(generation_pb2.GetServerInfoRequest())
            assert info.status == generation_pb2.STATUS_STOPPED
            assert (server.http("/live")[0], server.http("/metrics")[0]) == (503, 200)
            await asyncio.sleep(1)
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            assert not await watch.read()  # the end
            assert await watch.code() is grpc.StatusCode.OK  # its own, and not that of calls that were waited for
            assert await asyncio.to_thread(server.process.wait, 20) == 0

    try:
        asyncio.run(scenario())
    finally:
        server.process.kill()
        server.process.wait()


def test_told_to_end_it_finishes_what_it_has(tmp_path, quick):
    server = Server(tmp_path, *quick)
    assert server.http("/ready")[0] == 503 if _listening(server) else True
    server.wait_until("ready: micro")

    async def scenario() -> tuple[Any, str]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            stub = server.stub(channel)
            asked = pb.GenerateRequest(
                request_id="last",
                tokenized=pb.TokenizedInput(input_ids=[70, 71, 72]),
                sampling_params=pb.SamplingParams(max_new_tokens=900, ignore_eos=True),
                stream=True,
            )
            call = aiter(stub.Generate(asked))
            await anext(call)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Generate(pb.GenerateRequest(request_id="late", tokenized=asked.tokenized)):
                    pass
            rest = [r async for r in call]
            return rest[-1].complete, caught.value.code().name

    complete, late = asyncio.run(scenario())
    assert (complete.finish_reason, complete.completion_tokens) == ("length", 900)
    assert late == "UNAVAILABLE"
    assert server.process.wait(20) == 0


def test_told_twice_it_ends_at_once(tmp_path, quick):
    server = Server(tmp_path, *quick)
    server.wait_until("not ready yet")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0


def _listening(server: Server) -> bool:
    try:
        server.wait_until("not ready yet", 60)
    except AssertionError:
        return False
    return True
