"""Metrics as Prometheus' own parsers read them, and a dashboard that draws only what there is."""

import json
import random
import re
from importlib import resources

import pytest
from prometheus_client.parser import text_string_to_metric_families

import serve
from serve.generation import Load, Usage
from serve.metrics import Metrics

LOAD = Load(
    running=3, waiting=2, slots=4, used_tokens=640, total_tokens=1280, cached_tokens=64, snapshots=1, total_snapshots=8
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def scraped(metrics):
    """Values by name and labels other than the model's."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            labels = dict(sample.labels)
            if not sample.name.startswith("process_"):
                assert labels.pop("model_name") == "m"
            assert family.documentation
            key = (sample.name, *labels.values())
            assert key not in found
            found[key] = sample.value
    return found


def served(**more):
    """A server that did one of everything."""
    metrics = Metrics("m", lambda: LOAD, 7, **more)
    metrics.loaded(30)
    metrics.compiled(5, after_ready=False)
    metrics.started(60)
    metrics.queued()
    metrics.step("prefill", 0.05, 100, 28)
    metrics.first_token(0.3)
    metrics.step("decode", 0.012, 8, 24)
    metrics.round(7, 3, 4)
    metrics.inter_token(0.01, 4)
    metrics.round(7, 0, 1)
    metrics.inter_token(0.03, 1)
    metrics.finished("stop", Usage(100, 64, 6, 2, 14, 3), 0.01, 0.4)
    metrics.refused("RESOURCE_EXHAUSTED")
    metrics.retracted(2)
    metrics.compiled(3, after_ready=True)
    return metrics


@pytest.mark.parametrize("prefix", ["mimo:", "sglang:"])
def test_everything_that_was_told_can_be_read(prefix):
    found = scraped(served(prefix=prefix))
    expected = {
        ("num_running_reqs",): 3,
        ("num_queue_reqs",): 2,
        ("token_usage",): 0.75,
        ("full_token_usage",): 0.5,
        ("swa_token_usage",): 0.75,
        ("max_total_num_tokens",): 1280,
        ("num_snapshots",): 1,
        ("requests_received_total",): 1,
        ("requests_refused_total", "RESOURCE_EXHAUSTED"): 1,
        ("requests_finished_total", "stop"): 1,
        ("requests_finished_total", "length"): 0,
        ("num_requests_total",): 1,
        ("num_aborted_requests_total",): 0,
        ("num_retracted_requests_total",): 2,
        ("prompt_tokens_total",): 100,
        ("cached_tokens_total",): 64,
        ("generation_tokens_total",): 6,
        ("spec_verify_calls_total",): 2,
        ("spec_round_tokens_total",): 5,
        ("spec_drafted_tokens_total",): 14,
        ("spec_accepted_tokens_total",): 3,
        **{("spec_accepted_tokens_per_position_total", str(p)): int(p <= 3) for p in range(1, 8)},
        ("step_tokens_total", "prefill"): 100,
        ("step_padded_tokens_total", "decode"): 24,
        ("jit_compiles_total",): 2,
        ("jit_compiles_after_ready_total",): 1,
        ("compile_seconds_total",): 8,
        ("startup_time_seconds",): 60,
        ("weight_load_duration_seconds",): 30,
        ("spec_accept_length",): 2.5,
        ("spec_accept_rate",): 3 / 14,
        ("cache_hit_rate",): 0.64,
        ("time_to_first_token_seconds_count",): 1,
        ("time_to_first_token_seconds_bucket", "0.2"): 0,
        ("time_to_first_token_seconds_bucket", "0.4"): 1,
        ("inter_token_latency_seconds_count",): 5,
        ("inter_token_latency_seconds_bucket", "0.01"): 4,
        ("inter_token_latency_seconds_bucket", "0.03"): 5,
        ("queue_time_seconds_sum",): 0.01,
        ("e2e_request_latency_seconds_bucket", "0.4"): 1,
        ("step_duration_seconds_bucket", "decode", "0.015"): 1,
        ("step_duration_seconds_count", "prefill"): 1,
    }
    for (name, *labels), value in expected.items():
        assert found[(prefix + name, *labels)] == pytest.approx(value), name
    assert found[(prefix + "inter_token_latency_seconds_sum",)] == pytest.approx(0.07)
    assert ("process_resident_memory_bytes",) in found


def test_positions_add_up_over_many_rounds(rng):
    metrics, choose = Metrics("m", lambda: LOAD, 7), random.Random(int(rng.integers(1 << 30)))
    stood = [0] * 7
    for _ in range(500):
        accepted = choose.randint(0, 7)
        metrics.round(7, accepted, accepted + 1)
        stood = [s + (p < accepted) for p, s in enumerate(stood)]
    found = scraped(metrics)
    assert [found[("mimo:spec_accepted_tokens_per_position_total", str(p + 1))] for p in range(7)] == stood
    assert found[("mimo:spec_accepted_tokens_total",)] == sum(stood)
    assert found[("mimo:generation_tokens_total",)] == 500 + sum(stood)
    assert found[("mimo:spec_accept_length",)] == pytest.approx(1 + sum(stood) / 500)


def test_without_a_drafter_a_round_is_a_token():
    metrics = Metrics("m", lambda: LOAD, 0)
    metrics.first_token(0.1)
    metrics.round(0, 0, 1)
    found = scraped(metrics)
    assert found[("mimo:generation_tokens_total",)] == 2
    assert found[("mimo:spec_accept_length",)] == 1
    assert found[("mimo:spec_accept_rate",)] == 0
    assert not [key for key in found if "per_position" in key[0]]


def test_gauges_look_back_ten_seconds_or_a_little_more():
    clock = Clock()
    metrics = Metrics("m", lambda: LOAD, 7, clock=clock)
    seen = {}
    for second in range(1, 61):
        clock.now += 1
        for _ in range(10 if second <= 30 else 20):
            metrics.round(7, 1, 2)
        seen[second] = scraped(metrics)[("mimo:gen_throughput",)]
    assert [seen[s] for s in (1, 5, 30)] == pytest.approx([20, 20, 20])
    assert [seen[s] for s in (50, 60)] == pytest.approx([40, 40])
    clock.now += 1000
    scraped(metrics)
    clock.now += 15
    assert scraped(metrics)[("mimo:gen_throughput",)] == 0


def test_another_prefix_is_refused():
    with pytest.raises(ValueError, match="begin with mimo: or sglang:, not 'vllm:'"):
        Metrics("m", lambda: LOAD, 7, prefix="vllm:")


def test_the_dashboard_draws_only_what_there_is():
    board = json.loads(resources.files(serve).joinpath("deploy/grafana.json").read_text(encoding="utf-8"))
    existing = {key[0].removeprefix("mimo:") for key in scraped(served())}
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 15
    used = set()
    for query in queries:
        used.update(re.findall(r"\$\{prefix\}:(\w+)", query))
        assert query.count("(") == query.count(")")
    assert used <= existing
    for wanted in ("spec_accepted_tokens_per_position_total", "jit_compiles_after_ready_total", "num_queue_reqs"):
        assert wanted in used
    assert {v["name"] for v in board["templating"]["list"]} == {"datasource", "prefix", "model"}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)  # none lies over another
    assert max(x for x, _ in cells) < 24
