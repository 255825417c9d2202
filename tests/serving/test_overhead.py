"""What serving costs: the commands work, and their figures agree with each other. None is held against a bound."""

import json

import pytest

from mimo_jax.synthesize import synthesize
from serve.cli import main as mimo_serve
from tests.checkpoint_files import MICRO


def overhead(tmp_path, *words):
    out = tmp_path / "results.json"
    assert mimo_serve(["overhead", *words, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_the_host_alone(tmp_path, capsys):
    words = ("--streams", "1,3", "--step-milliseconds", "0,4", "--rounds", "12", "--runs", "2")
    found = overhead(tmp_path, "host", *words)
    assert set(found["machine"]) == {"device", "platform", "jax", "date"}
    assert [(c["step_milliseconds"], c["streams"]) for c in found["host"]] == [(0, 1), (0, 3), (4, 1), (4, 3)]
    for cost in found["host"]:
        assert (cost["rounds"], cost["messages"]) == (12, 12 * cost["streams"])
        assert cost["round"]["runs"] == 2
        assert cost["round"]["low"] >= 1e3 * cost["step_milliseconds"]  # steps do not overlap
        assert cost["beyond_device"]["median"] == pytest.approx(
            cost["round"]["median"] - 1e3 * cost["step_milliseconds"]
        )
        assert cost["cpu_message"]["median"] == pytest.approx(cost["cpu_round"]["median"] / cost["streams"])
        assert 0 < cost["engine_round"]["high"] <= cost["cpu_round"]["high"]
    shown = capsys.readouterr().out
    assert found["machine"]["date"] in shown
    assert "Microseconds of the host" in shown


@pytest.mark.slow
def test_both_sides_give_the_same_tokens(tmp_path, capsys):
    synthesize(MICRO, tmp_path / "model", seed=0)
    server = ("--model", str(tmp_path / "model"), "--max-running-requests", "2", "--context-length", "1024")
    found = overhead(
        tmp_path,
        *("offline", "--runs", "1", "--max-new-tokens", "6", "--temperature", "1"),
        *(*server, "--chunked-prefill-size", "64", "--rounds-per-dispatch", "2", "--disable-precompile"),
    )
    compared = found["offline"]
    assert (compared["requests"], compared["new_tokens"], compared["different"]) == (2, 12, 0)
    assert compared["prompt_tokens"] > 0
    speeds = [compared[side]["tokens_per_second"]["median"] for side in ("offline", "server")]
    assert compared["ratio"]["median"] == pytest.approx(speeds[1] / speeds[0])
    times = [compared[side]["processor_seconds"]["median"] for side in ("offline", "server")]
    assert compared["processor_ratio"]["median"] == pytest.approx(times[0] / times[1])
    for side in ("offline", "server"):
        seconds = 12 / compared[side]["tokens_per_second"]["median"]
        assert 0 < compared[side]["first_tokens_seconds"]["median"] < seconds
    assert found["server"]["rounds_per_dispatch"] == 2
    assert "2 of 2 answers are the same tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("host", "--runs", "1", "--tp-size", "2"), "--tp-size: only `overhead offline` takes the server's flags"),
        (("offline", "--nonsense"), "unknown flag --nonsense"),
        (("offline", "--max-new-tokens", "5000"), "do not fit a context of 4096"),
        (("host", "--json", "/nowhere/at/all"), "does not exist"),
    ],
)
def test_what_cannot_be_done(words, message, capsys):
    assert mimo_serve(["overhead", *words]) == 2
    assert message in capsys.readouterr().err
