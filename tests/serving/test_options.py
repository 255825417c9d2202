"""What flags resolve to: defaults, checks, models from folders and from the Hub, the dry run on every rank."""

import json
import os
import shutil
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import pytest

from mimo_jax.config import ConfigError
from mimo_jax.presets import NANO
from mimo_jax.synthesize import synthesize
from serve import cli, launch_server
from serve.flags import parse
from serve.options import ServerOptions
from serve.resolution import default_platform, resolve
from sharding.hosts import HostsError
from sharding.topology import TopologyError
from tests.serving import release_card
from tests.serving.config_folders import write_configurations

PRO = "MiMo-V2.5-Pro-FP4-DFlash"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of folders: the release, and models of other formats."""
    folder = tmp_path_factory.mktemp("models")
    write_configurations(folder / PRO, "mimo-v2.5-pro")
    write_configurations(folder / "fp8", "mimo-v2.5")
    write_configurations(folder / "undrafted", "mimo-v2-flash")
    write_configurations(folder / "plain", "tiny")
    config = json.loads((folder / "plain" / "config.json").read_text())
    del config["quantization_config"]
    (folder / "plain" / "config.json").write_text(json.dumps(config))
    synthesize("tiny", folder / "tiny", seed=0)
    return folder


def options(*words, environment=None, notes=None) -> ServerOptions:
    arguments = parse([str(word) for word in words])
    resolved = resolve(arguments, environment if environment is not None else {"JAX_PLATFORMS": "cpu"}, weights=False)
    if notes is not None:
        notes += arguments.notes
    return resolved


def dry_run(capsys, *words) -> tuple[int, dict, str]:
    status = launch_server.main([*map(str, words), "--dry-run"])
    out, err = capsys.readouterr()
    return status, json.loads(out or "{}"), err


@pytest.mark.parametrize("rank", [0, 1])
def test_the_release_card_resolves_on_every_rank(models, monkeypatch, capsys, rank):
    monkeypatch.chdir(models)
    status, resolved, err = dry_run(capsys, *release_card.flags(rank))
    assert status == 0, err
    expected = {
        "model_path": PRO,
        "served_model_name": PRO,
        "speculative_algorithm": "DFLASH",
        "speculative_draft_model_path": f"{PRO}/dflash",
        "verify_length": 8,
        "mesh": {"data": 2, "tensor": 8},
        "tp_size": 16,
        "ep_size": 16,
        "dp_size": 2,
        "enable_dp_attention": True,
        "enable_dp_lm_head": True,
        "moe_dense_tp_size": 1,
        "dtype": "bfloat16",
        "mem_fraction_static": 0.65,
        "context_length": 65536,
        "page_size": 1,
        "overlap": False,
        "precompile": True,
        "nnodes": 2,
        "node_rank": rank,
        "dist_init_addr": "10.0.0.1:20000",
        "host": "0.0.0.0",
        "grpc_port": 29999,
        "http_port": 30000,
    }
    assert {name: resolved.get(name) for name in expected} == expected
    assert "--trust-remote-code has no effect" in err
    assert "--attention-backend has no effect" in err
    assert "--skip-server-warmup has no effect" in err
    assert f"WARNING [rank {rank}]" in err
    assert "configurations alone were checked" in err


def test_defaults_serve_the_small_model(capsys):
    status, resolved, err = dry_run(capsys)
    assert status == 0
    assert (resolved["model_path"], resolved["served_model_name"]) == (str(NANO), "nano")
    assert (resolved["max_running_requests"], resolved["max_queued_requests"]) == (8, 64)
    assert (resolved["context_length"], resolved["verify_length"], resolved["dtype"]) == (4096, 8, "auto")
    assert resolved["rounds_per_dispatch"] == 2
    assert (resolved["host"], resolved["grpc_port"], resolved["http_port"]) == ("127.0.0.1", 30000, 30001)
    assert "complete by their headers" in err
    assert "no effect" not in err


def test_accelerators_run_as_many_as_sglang(models):
    on_gpu = {"JAX_PLATFORMS": "cuda"}
    assert options(environment=on_gpu).max_running_requests == 48
    assert options("--device", "cpu", environment=on_gpu).max_running_requests == 8
    parallel = ("--tp", 64, "--dp", 32, "--ep", 64, "--enable-dp-attention", "--enable-dp-lm-head")
    wide = options("--model", models / PRO, *parallel, "--moe-dense-tp-size", 1, environment=on_gpu)
    assert wide.max_running_requests == 64  # the next number that 32 groups share


def test_platform_is_what_jax_is_told():
    assert default_platform({"JAX_PLATFORMS": "cpu,cuda"}) == "cpu"
    assert default_platform({"JAX_PLATFORMS": "cuda,cpu"}) == "cuda"
    assert default_platform({}) in ("cpu", "cuda")


def test_options_are_frozen_and_never_show_keys():
    resolved = options("--api-key", "first-secret", "--admin-api-key", "second-secret")
    assert (resolved.api_key, resolved.admin_api_key) == ("first-secret", "second-secret")
    for shown in (repr(resolved), json.dumps(resolved.as_json())):
        assert "secret" not in shown
    assert resolved.as_json()["api_key"] is True
    assert options().as_json()["api_key"] is False
    with pytest.raises(FrozenInstanceError):
        resolved.page_size = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_as_json_has_every_option():
    resolved = options()
    renamed = {"model": "model_path", "load": "tp_size", "group": "node_rank"}
    assert [n for n in vars(resolved) if renamed.get(n, n) not in resolved.as_json()] == []


def test_attention_data_parallelism_under_both_names(models):
    rest = ("--model", models / PRO, "--tp", 16, "--ep", 16, "--enable-dp-lm-head", "--moe-dense-tp-size", 1)
    newer, older = options(*rest, "--attn-dp-size", 2), options(*rest, "--dp", 2, "--enable-dp-attention")
    assert newer == older
    assert newer.load.topology.axes == {"data": 2, "tensor": 8}


def test_speculation_is_by_the_models_drafter_if_it_has_one(models):
    assert options("--model", models / PRO).drafter == models / PRO / "dflash"
    plain = options("--model", models / PRO, "--speculative-algorithm", "none")
    assert (plain.drafter, plain.verify_length, plain.block_size) == (None, 1, 1)
    assert options("--model", models / "undrafted").drafter is None
    shorter = options("--model", models / PRO, "--speculative-dflash-block-size", 4)
    assert (shorter.verify_length, shorter.block_size) == (4, 8)


def test_lengths(models):
    assert options("--model", models / PRO).context_length == 2**20
    assert options("--model", models / PRO, "--context-length", "64k").context_length == 64_000
    assert options("--chunked-prefill-size", 65536).chunked_prefill_size == 4096  # no longer than the context
    assert options("--context-length", 100).chunked_prefill_size == 128
    assert options("--disable-radix-cache").max_snapshots == 0
    assert options("--swa-prefix-tails", 5).max_snapshots == 5
    assert options("--max-total-tokens", "1M").max_total_tokens == 10**6


@pytest.mark.parametrize("size", [1, 16, 64])
def test_page_sizes(size):
    assert options("--page-size", size).page_size == size


@pytest.mark.parametrize(
    ("words", "ports"),
    [
        ("--port 5", (5, 6)),
        ("--port 5 --grpc-port 7", (7, 8)),
        ("--port 5 --http-port 9", (5, 9)),
        ("--port 0", (0, 0)),
        ("--port 0 --http-port 9", (0, 9)),
    ],
)
def test_ports(words, ports):
    resolved = options(*words.split())
    assert (resolved.grpc_port, resolved.http_port) == ports


@pytest.mark.parametrize(
    ("said", "url"),
    [("localhost:4317", "http://localhost:4317"), ("https://collector:4317/x", "https://collector:4317/x")],
)
def test_collectors_of_spans(said, url):
    assert options("--otlp-traces-endpoint", said).otlp_traces_endpoint == url


def test_lines_can_be_for_machines(capsys):
    status, _, err = dry_run(capsys, "--log-format", "json", "--trust-remote-code")
    assert status == 0
    assert any("--trust-remote-code" in json.loads(line)["message"] for line in err.splitlines())


@pytest.mark.parametrize("said", ["fp8", "mxfp4", "auto"])
def test_quantization_that_the_checkpoint_has(models, said):
    options("--model", models / PRO, "--quantization", said)


def test_groups_come_from_launchers_too():
    environment = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "leader", "LWS_WORKER_INDEX": "1"}
    resolved = options("--tp", 2, environment=environment)
    assert (resolved.process, resolved.as_json()["dist_init_addr"]) == (1, "leader:20000")
    assert options().process == 0


BAD = [
    ("--model nowhere/at/all/./x", "no such folder, and no name of a Hugging Face repository"),
    ("--model {models}/absent", "no such folder"),
    ("--model {models}", "config.json: no such file"),
    ("--data-parallel-size 2 --tp 2", "run 2 servers behind a gateway such as smg, or add --enable-dp-attention"),
    ("--attn-dp-size 2 --dp 4 --tp 4", "--attn-dp-size 2 and --data-parallel-size 4 must be equal"),
    ("--enable-dp-lm-head", "--enable-dp-lm-head needs --enable-dp-attention"),
    ("--model {models}/PRO --tp 16 --ep 16 --attn-dp-size 2 --moe-dense-tp-size 1", "needs --enable-dp-lm-head"),
    ("--speculative-algorithm dflash --model {models}/undrafted", "DFLASH needs a drafter"),
    ("--speculative-algorithm none --speculative-draft-model-path x", "leave one out"),
    ("--speculative-draft-model-path {models}/absent", "no such folder"),
    ("--model {models}/PRO --speculative-draft-model-path {models}/PRO/absent", "has no folder absent"),
    ("--model {models}/PRO --speculative-draft-model-path {models}/tiny/dflash", "does not fit its backbone"),
    ("--speculative-num-draft-tokens 9", "--speculative-num-draft-tokens 9 must be at most 8"),
    ("--speculative-num-draft-tokens 4 --speculative-dflash-block-size 8", "must be equal"),
    ("--model {models}/undrafted --speculative-num-draft-tokens 2", "must be 1: there is no drafter"),
    ("--quantization mxfp4 --model {models}/fp8", "holds FP8 linears and FP8 experts"),
    ("--quantization fp8 --model {models}/plain", "holds no quantised weights"),
    ("--kv-cache-dtype bfloat16", "the dtype of activations, float32"),
    ("--kv-cache-dtype bfloat16 --dtype float32", "the dtype of activations, float32"),
    ("--device cuda --mem-fraction-static 0.95", "JAX may allocate 0.92"),
    ("--context-length 4097", "beyond the model's 4096"),
    ("--context-length 8", "no room for a prompt token and a block of 8"),
    ("--page-size 48", "--page-size 48 must be a power of two of at least 1, such as 32"),
    ("--chunked-prefill-size 100", "such as 64"),
    ("--chunked-prefill-size 8", "must be a power of two of at least 16"),
    ("--max-total-tokens 64", "at least 72: a page and a block"),
    ("--swa-prefix-tails 5 --disable-radix-cache", "leave one out"),
    ("--port 65535", "--http-port"),
    ("--port 80 --http-port 80", "cannot share port 80"),
    ("--chat-template {models}/absent.jinja", "no such file"),
    ("--chat-template {models}/broken.jinja", "broken.jinja, line 1"),
    ("--tokenizer-path {models}/PRO", "there is no tokenizer.json"),
    ("--ssl-certfile {models}/cert.pem", "go together"),
    ("--ssl-ca-certs {models}/cert.pem", "--ssl-ca-certs needs"),
    ("--ssl-certfile {models}/absent.pem --ssl-keyfile {models}/absent.pem", "absent.pem"),
    ("--api-key=", "--api-key must be printable ASCII without spaces, and not empty"),
    ("--metrics-prefix vllm:", "choose from 'mimo:', 'sglang:'"),
    ("--tp 2 --nnodes 3 --node-rank 0 --dist-init-addr h:1", "does not divide by 3"),
    ("--tp 2 --nnodes 2 --node-rank 0 --dist-init-addr h:30000", "processes meet at 30000 and 30001"),
    ("--tp 2 --nnodes 2 --node-rank 2 --dist-init-addr h:1", "numbers go from 0 to 1"),
    ("--otlp-traces-endpoint ftp://collector", "must be such as http://localhost:4317"),
    ("--tp 2 --nnodes 2", "without --dist-init-addr and --node-rank"),
    ("--tp 3", "8 heads of full attention cannot be cut into 3 equal parts"),
    ("--tp 4 --ep 3", "expert_parallel 3 is no part of a mesh"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda x: x[:60])
def test_what_cannot_be_is_one_clear_line(models, capsys, monkeypatch, words, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _unreachable)
    (models / "broken.jinja").write_text("{% if %}")
    (models / "cert.pem").write_text("")
    words = [word.format(models=models).replace("/PRO", f"/{PRO}") for word in words.split()]
    status, _, err = dry_run(capsys, *words)
    assert status == 2
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line


def _unreachable(*_, **__):
    raise ConnectionError("the network is not for tests")


def test_errors_have_the_kind_of_what_is_wrong(models):
    with pytest.raises(TopologyError):
        options("--tp", 4, "--ep", 3)
    with pytest.raises(HostsError):
        options("--tp", 2, "--nnodes", 2)
    with pytest.raises(ConfigError):
        options("--model", models)


def test_running_requests_are_shared_by_groups(models):
    parallel = ("--tp", 16, "--dp", 2, "--ep", 16, "--enable-dp-attention", "--enable-dp-lm-head")
    rest = ("--model", models / PRO, *parallel, "--moe-dense-tp-size", 1, "--max-running-requests")
    assert options(*rest, 6).max_running_requests == 6
    with pytest.raises(ValueError, match="--max-running-requests 7 does not divide by the 2 data-parallel groups"):
        options(*rest, 7)


def test_the_allocators_share_is_the_environments_if_it_says(models):
    gpu = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.7"}
    assert options("--mem-fraction-static", 0.65, environment=gpu).mem_fraction_static == 0.65
    with pytest.raises(ValueError, match=r"JAX may allocate 0\.7"):
        options("--mem-fraction-static", 0.75, environment=gpu)
    with pytest.raises(ValueError, match="must be a number, not 'most'"):
        options(environment={**gpu, "XLA_PYTHON_CLIENT_MEM_FRACTION": "most"})


def test_keys_in_the_clear_are_noted(tmp_path):
    notes = []
    options("--api-key", "k", "--host", "0.0.0.0", notes=notes)
    assert len(notes) == 1
    assert "unencrypted" in notes[0]
    (tmp_path / "pem").write_text("")
    tls = ("--ssl-certfile", tmp_path / "pem", "--ssl-keyfile", tmp_path / "pem")
    for words in ([], ["--host", "0.0.0.0", *tls]):
        quiet = []
        options("--api-key", "k", *words, notes=quiet)
        assert quiet == []


class Hub:
    """Stands for the Hugging Face Hub: gives folders, and remembers what it was asked for."""

    def __init__(self, **repositories: Path):
        self.repositories, self.asked = repositories, []

    def __call__(self, repository, *, revision=None, cache_dir=None, allow_patterns=None):
        self.asked.append((repository, revision, cache_dir, allow_patterns))
        if repository not in self.repositories:
            raise huggingface_hub.errors.RepositoryNotFoundError(
                f"404 for {repository}\nmore",
                response=SimpleNamespace(headers={}, request=None),
            )
        return str(self.repositories[repository])


@pytest.fixture
def hub(models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / PRO, tmp_path / "cache" / "pro")
    (tmp_path / "cache" / "pro" / "tokenizer.json").write_text("{}")
    made = Hub(**{"XiaomiMiMo/Pro": tmp_path / "cache" / "pro", "Pro": tmp_path / "cache" / "pro"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
    return made


@pytest.mark.parametrize("name", ["XiaomiMiMo/Pro", "Pro"])
def test_models_come_from_the_hub(hub, name):
    resolved = options("--model", name, "--revision", "v1", "--download-dir", "kept")
    assert resolved.model == hub.repositories[name]
    assert resolved.served_model_name == name
    assert resolved.drafter == hub.repositories[name] / "dflash"
    assert hub.asked == [(name, "v1", Path("kept"), ["*.json", "*.jinja"])]


def test_weights_are_fetched_to_serve(hub):
    resolve(parse(["--model", "Pro"]), {"JAX_PLATFORMS": "cpu"})
    assert hub.asked[0][3] == ["*"]


def test_drafters_come_from_inside_the_models_repository(hub):
    for name in ("XiaomiMiMo/Pro", "Pro"):
        hub.asked.clear()
        resolved = options("--model", name, "--speculative-draft-model-path", f"{name}/dflash")
        assert resolved.drafter == hub.repositories[name] / "dflash"
        assert len(hub.asked) == 1


def test_drafters_come_from_inside_another_repository(hub, models):
    given = ("--speculative-draft-model-path", "XiaomiMiMo/Pro/dflash", "--speculative-draft-model-revision", "v2")
    resolved = options("--model", models / PRO, *given)
    assert resolved.drafter == hub.repositories["XiaomiMiMo/Pro"] / "dflash"
    assert hub.asked == [("XiaomiMiMo/Pro", "v2", None, ["dflash/*.json", "dflash/*.jinja"])]


def test_tokenizers_come_from_the_hub_or_another_folder(hub, models):
    assert options("--tokenizer-path", "Pro").tokenizer == hub.repositories["Pro"]
    assert options("--tokenizer-path", models / "tiny").tokenizer == models / "tiny"
    assert options().tokenizer == NANO


def test_folders_come_first(hub, models, monkeypatch):
    monkeypatch.chdir(models)
    notes = []
    assert options("--model", PRO, "--revision", "v1", notes=notes).model == Path(PRO)
    assert hub.asked == []
    assert notes == [f"--revision has no effect: {PRO} is a folder here"]


def test_what_the_hub_does_not_have_is_said(hub):
    with pytest.raises(ConfigError, match=r"XiaomiMiMo/Absent: no such folder, and .*: 404 for XiaomiMiMo/Absent$"):
        options("--model", "XiaomiMiMo/Absent")


def test_without_the_hubs_library_an_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'mimo-jax\[serve\]'"):
        options("--model", "XiaomiMiMo/Absent")


def test_a_damaged_checkpoint_fails_the_dry_run(models, capsys, tmp_path):
    shutil.copytree(models / "tiny", tmp_path / "tiny")
    status, _, err = dry_run(capsys, "--model", tmp_path / "tiny")
    assert status == 0
    assert "complete by their headers" in err
    next((tmp_path / "tiny").glob("model-*.safetensors")).unlink()
    status, _, err = dry_run(capsys, "--model", tmp_path / "tiny")
    assert status == 2
    assert "error:" in err


def test_launching_prepares_the_process_and_serves(monkeypatch):
    served = []

    def run(options):
        served.append((options, os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]))
        return 7

    monkeypatch.setitem(sys.modules, "serve.server", SimpleNamespace(run=run))
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda name, value: served.append((name, value)))
    assert launch_server.main(["--port", "0", "--device", "cpu"]) == 7
    (name, value), (resolved, fraction) = served
    assert (name, value) == ("jax_platforms", "cpu")  # and no compilation cache on a CPU
    assert resolved.grpc_port == 0
    assert fraction == "0.92"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")
    assert launch_server.main([]) == 7
    assert served[-1][1] == "0.85"


@pytest.mark.parametrize("error", [ValueError("not so"), MemoryError("too little")])
def test_failures_that_people_can_mend_end_with_2(monkeypatch, capsys, error):
    def run(_):
        raise error

    monkeypatch.setitem(sys.modules, "serve.server", SimpleNamespace(run=run))
    assert launch_server.main([]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {error}"


def test_faults_end_with_1_or_a_traceback(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "serve.server", SimpleNamespace(run=lambda _: 1 / 0))
    assert launch_server.main([]) == 1
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        launch_server.main(["--log-level", "debug"])


def test_the_command_starts_a_server_or_a_client(monkeypatch, capsys):
    called = []
    for name in ("serve.chat", "serve.bench"):
        monkeypatch.setitem(
            sys.modules, name, SimpleNamespace(main=lambda argv, name=name: called.append((name, argv)) or 0)
        )
    assert cli.main(["chat", "--x", "1"]) == 0
    assert cli.main(["bench"]) == 0
    assert called == [("serve.chat", ["--x", "1"]), ("serve.bench", [])]
    assert cli.main(["--port", "7", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["grpc_port"] == 7
    assert cli.main(["chatt"]) == 2
    assert "unknown command 'chatt'; there are chat, bench, overhead" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "usage: mimo-serve [flags]" in out
    assert "mimo-serve chat ..." in out
