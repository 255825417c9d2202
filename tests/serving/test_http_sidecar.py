"""The sidecar asked by an HTTP client."""

import socket
from contextlib import asynccontextmanager

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.engine.late import LateEngine
from serve.generation import Status
from serve.http_sidecar import HttpSidecar
from serve.metrics import Metrics
from tests.serving.scripted_engine import ScriptedEngine


@asynccontextmanager
async def running(engine):
    sidecar = HttpSidecar(engine)
    port = await sidecar.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
        yield sidecar, client
    await sidecar.stop()


async def get(client, path):
    async with client.get(path) as answer:
        return answer.status, await answer.text()


@pytest.mark.parametrize(
    ("status", "live", "ready"),
    [
        (Status.STARTING, 200, 503),
        (Status.READY, 200, 200),
        (Status.DRAINING, 200, 503),
        (Status.STALLED, 503, 503),
        (Status.FAILED, 503, 503),
        (Status.STOPPED, 503, 503),
    ],
)
async def test_living_is_not_being_ready(status, live, ready):
    engine = ScriptedEngine()
    engine.status = status
    async with running(engine) as (_, client):
        assert await get(client, "/live") == (live, f"{status.value}\n")
        assert await get(client, "/ready") == await get(client, "/health") == (ready, f"{status.value}\n")


async def test_metrics_before_and_after_there_are_any():
    engine = ScriptedEngine()
    async with running(engine) as (sidecar, client):
        assert await get(client, "/metrics") == (503, "no metrics yet: the server is starting\n")
        sidecar.show(Metrics("scripted", engine.load, 7))
        async with client.get("/metrics") as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            families = {f.name: f for f in text_string_to_metric_families(await answer.text())}
    assert families["mimo:max_running_requests"].samples[0].value == engine.info.max_running


async def test_info_before_and_after_there_is_an_engine():
    late = LateEngine()
    late.progress = "loading weights: 3 of 7"
    async with running(late) as (_, client):
        assert await get(client, "/live") == (200, "starting\n")
        async with client.get("/info") as answer:
            shown = await answer.json()
        assert shown == {"status": "starting", "message": f"the server is not ready yet: {late.progress}"}
        engine = ScriptedEngine(settings={"tp_size": 2}, eos_ids=(0, 3))
        late.arrive(engine)
        async with client.get("/info") as answer:
            shown = await answer.json()
    assert shown["status"] == "ready"
    assert shown["info"]["model"] == "scripted"
    assert shown["info"]["eos_ids"] == [0, 3]
    assert shown["info"]["settings"] == {"tp_size": 2}
    assert shown["load"]["slots"] == engine.info.max_running


async def test_there_is_nothing_else():
    async with running(ScriptedEngine()) as (_, client):
        assert (await get(client, "/generate"))[0] == 404
        async with client.post("/live") as answer:
            assert answer.status == 405


async def test_a_taken_port_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot serve HTTP on 127.0.0.1:{port}: .*in use; choose another port"):
            await HttpSidecar(ScriptedEngine()).start("127.0.0.1", port)
    with pytest.raises(OSError, match=r"cannot serve HTTP on 192.0.2.1:0: .*assign requested address"):
        await HttpSidecar(ScriptedEngine()).start("192.0.2.1", 0)


async def test_stopping_does_not_wait_for_idle_clients():
    sidecar = HttpSidecar(ScriptedEngine())
    port = await sidecar.start("127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", port)):
        await sidecar.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
