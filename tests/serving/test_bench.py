"""The bench against the real service over a scripted engine, whose timing and acceptance are known."""

import asyncio
import json
import threading
from contextlib import contextmanager

import pytest
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import add_SglangSchedulerServicer_to_server

from mimo_jax.evaluation.prompts import load
from mimo_jax.presets import NANO
from mimo_jax.tokenizer import Tokenizer
from serve.bench import main
from serve.bench_client import Answer
from serve.bench_report import summarize
from serve.cli import main as mimo_serve
from serve.services.grpc_server import GrpcServer, Service
from serve.services.requests import Requests
from serve.services.scheduler_service import ADMIN_METHODS, SERVICE_NAME, SchedulerService
from tests.serving.scripted_engine import ScriptedEngine

TOKENIZER = Tokenizer.from_folder(NANO)


def rounds(request, index):
    """A prefill's token, then rounds of 4, 1, 8 and 4 that drafted 7 each."""
    return [[5], [6, 7, 8, 9], [10], [11] * 8, [12, 13, 14, 15]]


@contextmanager
def serving(engine, api_key=None):
    """A server in a thread of its own; gives its address."""
    service = SchedulerService(Requests(engine), NANO, NANO)
    added = Service(SERVICE_NAME, add_SglangSchedulerServicer_to_server, service, ADMIN_METHODS)
    there, ports, loop = threading.Event(), [], asyncio.new_event_loop()
    end = asyncio.Event()

    async def live():
        server = GrpcServer(engine, [added], "127.0.0.1:0", api_key=api_key)
        await server.start()
        ports.append(server.port)
        there.set()
        await end.wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(live()))
    thread.start()
    assert there.wait(20)
    yield f"127.0.0.1:{ports[0]}"
    loop.call_soon_threadsafe(end.set)
    thread.join(20)
    loop.close()


def scripted(**more):
    return ScriptedEngine(rounds, vocab_size=2048, max_running=64, max_queued=64, settings={"tp_size": 1}, **more)


def bench(address, tmp_path, *more):
    out = tmp_path / "results.json"
    status = main(["--address", address, "--json", str(out), *more])
    return status, json.loads(out.read_text())


def test_what_a_server_does_is_what_is_reported(tmp_path, capsys):
    engine, picture = scripted(seconds=0.02), tmp_path / "plot.png"
    with serving(engine) as address:
        status, found = bench(
            address, tmp_path, "--num-prompts", "20", "--max-concurrency", "4", "--seed", "7", "--plot", str(picture)
        )
    assert status == 0
    assert (found["answered"], found["failed"], found["errors"]) == (20, 0, {})
    every = {s["name"]: s for s in found["scenarios"]}
    assert list(every) == ["web", "math", "code", "chat", "edits", "all"]
    whole = every["all"]
    assert (whole["requests"], whole["new_tokens"], whole["rounds"]) == (20, 20 * 18, 80)
    assert whole["accepted_length"] == 17 / 4
    assert whole["acceptance_per_position"] == [0.75, 0.75, 0.75, 0.25, 0.25, 0.25, 0.25]
    prompts = [TOKENIZER.encode_chat(p.messages) for p in load("math")[:4]]
    assert every["math"]["prompt_tokens"] == sum(map(len, prompts))
    assert {tuple(r.prompt_ids) for r in engine.seen}.issuperset(map(tuple, prompts))
    assert len(engine.seen) == 22  # two to warm up
    assert {r.sampling.seed for r in engine.seen[2:]} == {7 + i for i in range(20)}
    latency = {entry["name"]: entry for entry in found["latencies"]}
    assert 0.02 <= latency["time to first token"]["median"] < 0.5
    assert latency["between tokens"]["count"] == 20 * 17
    # four rounds, two hundredths of a second each, gave seventeen tokens
    assert 4 * 0.02 / 17 <= latency["a token, mean of a request"]["median"] < 0.1
    assert 0.1 <= latency["whole request"]["median"] < 1
    assert found["new_tokens_per_second"] == pytest.approx(360 / found["seconds"])
    assert found["seconds"] > 0.1 * 20 / 4
    assert found["server"]["model"] == "scripted"
    assert found["server"]["settings"] == {"tp_size": 1}
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "20 answered, 0 failed" in shown
    assert "75 75 75 25 25 25 25" in shown


def test_a_cut_round_counts_what_it_accepted(tmp_path):
    with serving(scripted()) as address:
        _, found = bench(
            address, tmp_path, "--num-prompts", "3", "--scenario", "chat", "--max-new-tokens", "16", "--warmup", "0"
        )
    (chat,) = found["scenarios"]
    assert chat["new_tokens"] == 48
    assert chat["acceptance_per_position"] == [0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_requests_come_at_the_rate_and_are_the_same_again(tmp_path):
    engine = scripted()
    arguments = ("--num-prompts", "40", "--request-rate", "100", "--warmup", "0", "--seed", "3", "--scenario", "math")
    with serving(engine) as address:
        _, found = bench(address, tmp_path, *arguments)
        _, again = bench(address, tmp_path, *arguments)
    # both wait for the same last arrival
    assert found["seconds"] > 0.2
    assert again["seconds"] > 0.2
    assert found["scenarios"][0]["prompt_tokens"] == again["scenarios"][0]["prompt_tokens"]
    assert len({r.request_id for r in engine.seen}) == 80


def test_errors_are_counted_and_shown(tmp_path, capsys):
    engine = scripted(seconds=0.05)
    engine.info = type(engine.info)(**{**vars(engine.info), "max_running": 2, "max_queued": 1})
    with serving(engine) as address:
        status, found = bench(address, tmp_path, "--num-prompts", "10", "--max-concurrency", "10", "--warmup", "0")
    assert status == 1
    assert found["answered"] == 3
    assert found["errors"] == {"RESOURCE_EXHAUSTED: too many requests wait": 7}
    assert "RESOURCE_EXHAUSTED: too many requests wait" in capsys.readouterr().out


def test_when_all_fail_there_are_still_results(tmp_path, capsys):
    with serving(scripted(context_length=20)) as address:
        status, found = bench(address, tmp_path, "--num-prompts", "4", "--warmup", "0")
    assert status == 1
    assert (found["answered"], found["failed"], found["latencies"], found["scenarios"]) == (0, 4, [], [])
    assert "do not fit the context" in capsys.readouterr().out


def test_a_key_is_sent_and_not_written_down(tmp_path, capsys):
    with serving(scripted(), api_key="hunter2") as address:
        status, found = bench(address, tmp_path, "--num-prompts", "2", "--api-key", "hunter2", "--flush-cache")
        assert status == 0
        assert "hunter2" not in json.dumps(found)
        assert mimo_serve(["bench", "--address", address]) == 2
    assert f"error: {address}: UNAUTHENTICATED" in capsys.readouterr().err


def test_nobody_there(capsys):
    assert main(["--address", "127.0.0.1:1", "--connect-timeout", "0.2"]) == 2
    assert "no gRPC server answers at 127.0.0.1:1 within 0.2 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--request-rate", "0"], "must be a number above 0, not '0'"),
        (["--num-prompts", "0"], "must be a whole number of at least 1"),
        (["--scenario", "poems"], "invalid choice: 'poems'"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_results_that_cannot_be_written_are_no_reason_to_begin(tmp_path, capsys):
    assert main(["--address", "127.0.0.1:1", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "the folder" in capsys.readouterr().err


def test_messages_of_several_rounds_tell_nothing_of_positions():
    def answer(counts, drafted, accepted):
        arrivals = [(float(i), count) for i, count in enumerate(counts)]
        return Answer("math", 0.0, arrivals, 9.0, 5, 0, drafted, accepted, "length")

    one, two = answer([1, 3, 3], 14, 4), answer([1, 6], 14, 4)
    (scenario,) = summarize([one, two], 10.0).scenarios
    assert scenario.new_tokens == 14
    assert scenario.decoding.rounds == 2
    assert scenario.decoding.acceptance == [1, 1, 0, 0, 0, 0, 0]


def test_without_a_drafter_a_round_is_a_token():
    answer = Answer("math", 0.0, [(1.0, 1), (2.0, 1), (3.0, 1)], 3.0, 5, 0, 0, 0, "length")
    report = summarize([answer], 3.0)
    assert report.scenarios[0].decoding.accepted_length == 1
    assert report.scenarios[0].decoding.acceptance == []
    assert report.scenarios[0].tokens_per_second == 1
