"""Manifests are valid, start what our flags can start, and give a server the time it needs to end."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from serve import launch_server
from serve.flag_table import ANSWERED
from serve.flags import parse, parser
from tests.conftest import REPOSITORY
from tests.serving.config_folders import write_configurations

DEPLOY = REPOSITORY / "serve" / "deploy"
SCHEMAS = Path(__file__).parent / "kubernetes_schemas.json"
READY = {"sglang.grpc.scheduler.SglangScheduler", "mimo.serve.v1.Generation"}


def manifests(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


LWS, SERVICE = manifests("lws.yaml")
(JOBSET,) = manifests("jobset.yaml")
TEMPLATES = {
    "leader": LWS["spec"]["leaderWorkerTemplate"]["leaderTemplate"],
    "worker": LWS["spec"]["leaderWorkerTemplate"]["workerTemplate"],
    "job": JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"],
}


def container(role: str) -> dict:
    (only,) = TEMPLATES[role]["spec"]["containers"]
    return only


def schema(kind: str) -> dict:
    written = json.loads(SCHEMAS.read_text())
    return {**written, "$ref": f"#/$defs/{kind}"}


@pytest.mark.parametrize("manifest", [LWS, SERVICE, JOBSET], ids=lambda m: m["kind"])
def test_manifests_are_what_their_kind_allows(manifest):
    jsonschema.Draft202012Validator(schema(manifest["kind"])).validate(manifest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "leaderWorkerTemplate", "restartPolicy"), "RecreateGroup"),
        (("spec", "leaderWorkerTemplate", "sise"), 2),
        (("spec", "leaderWorkerTemplate", "leaderTemplate", "spec", "containers", 0, "livenessProbe", "port"), 1),
        (("spec", "leaderWorkerTemplate", "workerTemplate", "spec", "volumes", 0, "hostPath"), "/models"),
        (("spec", "leaderWorkerTemplate", "workerTemplate", "spec", "containers", 0, "args", 0), 1),
    ],
)
def test_schemas_find_mistakes(path, value):
    broken = yaml.safe_load(json.dumps(LWS))
    at = broken
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert not jsonschema.Draft202012Validator(schema("LeaderWorkerSet")).is_valid(broken)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_configurations(tmp_path_factory.mktemp("models") / "MiMo-V2.5-Pro-FP4-DFlash", "mimo-v2.5-pro")


def dry_run(arguments: list[str], release: Path, capsys) -> dict:
    moved = [a.replace("/models/MiMo-V2.5-Pro-FP4-DFlash", str(release)) for a in arguments]
    assert moved != arguments
    assert launch_server.main([*moved, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "no effect" not in err
    return json.loads(out)


def check_resolved(resolved: dict, rank: int, address: str) -> None:
    assert (resolved["nnodes"], resolved["node_rank"], resolved["dist_init_addr"]) == (2, rank, address)
    assert resolved["mesh"] == {"data": 2, "tensor": 8}
    assert (resolved["ep_size"], resolved["verify_length"]) == (16, 8)
    assert (resolved["host"], resolved["grpc_port"], resolved["http_port"]) == ("0.0.0.0", 30000, 30001)
    assert resolved["speculative_algorithm"] == "DFLASH"


@pytest.mark.parametrize(("role", "rank"), [("leader", 0), ("worker", 1)])
def test_the_leader_worker_sets_command_resolves(role, rank, release, capsys):
    variables = {"LWS_LEADER_ADDRESS": "mimo-0.mimo", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": str(rank)}
    arguments = [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], a) for a in container(role)["args"]]
    check_resolved(dry_run(arguments, release, capsys), rank, "mimo-0.mimo:20000")
    assert LWS["spec"]["leaderWorkerTemplate"]["size"] == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_the_job_sets_command_resolves(rank, release, capsys, monkeypatch):
    for variable in container("job")["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    monkeypatch.setenv("JOB_COMPLETION_INDEX", str(rank))
    address = f"{JOBSET['metadata']['name']}-nodes-0-0.{JOBSET['metadata']['name']}:20000"
    check_resolved(dry_run(container("job")["args"], release, capsys), rank, address)
    job = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_the_batch_scripts_command_resolves(rank, release, capsys, monkeypatch, tmp_path):
    script = DEPLOY / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    (tmp_path / "srun").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MODELS": "/m", "CACHE": "/c"}
    ran = subprocess.run(["bash", script], env=environment, check=True, capture_output=True, text=True)
    words = ran.stdout.splitlines()
    assert "--container-mounts=/m:/models:ro,/c:/cache" in words
    slurm = {"JOB_ID": 4096, "NTASKS": 2, "STEP_NUM_NODES": 2, "STEP_NODELIST": "node[03-04]", "PROCID": rank}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    resolved = dry_run(words[words.index("mimo-serve") + 1 :], release, capsys)
    check_resolved(resolved, rank, "node03:20000")
    (warned,) = re.findall(r"#SBATCH --signal=TERM@(\d+)", script.read_text())
    assert int(warned) > resolved["drain_timeout"]
    missing = subprocess.run(["bash", script], env={"PATH": environment["PATH"]}, capture_output=True, text=True)
    assert missing.returncode != 0
    assert "MODELS" in missing.stderr


def slept(role: str) -> int:
    command, seconds = container(role)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    return int(seconds)


def drained(role: str) -> float:
    return parse([a for a in container(role)["args"] if "$(" not in a]).drain_timeout


@pytest.mark.parametrize("role", ["leader", "job"])
def test_draining_fits_the_grace_period(role):
    assert TEMPLATES[role]["spec"]["terminationGracePeriodSeconds"] > slept(role) + drained(role)


def test_workers_outlive_their_leaders_draining():
    assert slept("leader") + drained("leader") < slept("worker")
    assert slept("worker") < TEMPLATES["worker"]["spec"]["terminationGracePeriodSeconds"]


def test_probes_ask_what_they_should():
    probes = {name: container("leader")[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert probes["startup"]["grpc"]["service"] in READY
    assert probes["readiness"]["grpc"]["service"] in READY
    assert probes["liveness"]["grpc"]["service"] == ""
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] == 3600
    ports = {port["name"]: port["containerPort"] for port in container("leader")["ports"]}
    assert {probe["grpc"]["port"] for probe in probes.values()} == {ports["grpc"]}
    assert {port["targetPort"]: port["port"] for port in SERVICE["spec"]["ports"]} == ports


def test_the_service_finds_the_leaders():
    selector = SERVICE["spec"]["selector"]
    assert selector["leaderworkerset.sigs.k8s.io/name"] == LWS["metadata"]["name"]
    assert selector["role"] == TEMPLATES["leader"]["metadata"]["labels"]["role"]
    assert selector["role"] != TEMPLATES["worker"]["metadata"]["labels"]["role"]
    assert SERVICE["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("role", TEMPLATES)
def test_pods_have_memory_for_nccl_and_no_more_rights_than_they_need(role):
    pod, only = TEMPLATES[role]["spec"], container(role)
    mounts = {mount["mountPath"]: mount["name"] for mount in only["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert {*mounts.values()} == {*volumes}
    assert pod["securityContext"]["runAsNonRoot"]
    assert not only["securityContext"]["allowPrivilegeEscalation"]
    gpus = int(only["resources"]["limits"]["nvidia.com/gpu"])
    assert 2 * gpus == parse([a for a in only["args"] if "$(" not in a]).tensor_parallel_size


def test_the_image_runs_the_server_as_nobody_special():
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    last: dict[str, str] = dict(steps)
    assert last["USER"] == "1000:1000"
    assert json.loads(last["ENTRYPOINT"]) == ["mimo-serve"]
    parse(json.loads(last["CMD"]))
    assert {"/models", "/cache"} == set(json.loads(last["VOLUME"]))
    environment = dict(word.split("=", 1) for word in shlex.split(last["ENV"]))
    assert environment["JAX_COMPILATION_CACHE_DIR"].startswith("/cache/")
    sources = [rest.split()[:-1] for instruction, rest in steps if instruction == "COPY" and "--from" not in rest]
    for name in (name for names in sources for name in names):
        assert (REPOSITORY / name).exists(), name
    assert all(role["image"].startswith("mimo-jax:") for role in map(container, TEMPLATES))


OTHERS = {  # of programs that the pages name beside ours
    "env.md": {"--xla_gpu_enable_latency_hiding_scheduler", "--shm-size"},
    "troubleshooting.md": {"--gpus", "--devices"},
}


@pytest.mark.parametrize("page", ["env.md", "troubleshooting.md"])
def test_flags_in_the_pages_exist(page):
    named = set(re.findall(r"--[a-z][\w-]+", (DEPLOY / page).read_text()))
    known = set(parser("mimo-serve")._option_string_actions)
    assert named - known == OTHERS[page]
    assert len(named & known) > 3
    assert not any(row.matches(name) for row in ANSWERED for name in named)  # nothing is advised that has no effect
