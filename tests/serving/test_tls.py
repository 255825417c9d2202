"""TLS with certificates made for the test: who gets in, who does not, and what is said of files that will not do."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from serve.channel import open_channel
from serve.protos.mimo.serve.v1 import generation_pb2 as pb
from serve.protos.mimo.serve.v1.generation_pb2_grpc import GenerationStub
from serve.services.grpc_server import GrpcServer
from serve.services.requests import Requests
from serve.services.security import server_credentials
from tests.serving.all_services import all_services
from tests.serving.text_server import TextEngine

CERTIFICATE, KEY = "server.pem", "server.key"


def write(folder: Path, authority: trustme.CA, name: str) -> trustme.LeafCert:
    """A certificate for 127.0.0.1 in `name`.pem, its key in `name`.key."""
    made = authority.issue_cert("127.0.0.1")
    made.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    made.private_key_pem.write_to_path(folder / f"{name}.key")
    return made


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> Path:
    """The server's files, its authority and another one's."""
    write(tmp_path, authority, "server")
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    stranger = trustme.CA(key_type=trustme.KeyType.ECDSA)
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    write(tmp_path, stranger, "strangers")
    return tmp_path


@asynccontextmanager
async def served(files: Path, clients: Path | None = None) -> AsyncIterator[GrpcServer]:
    credentials = server_credentials(files / CERTIFICATE, files / KEY, clients)
    async with all_services(Requests(TextEngine()), credentials=credentials) as (server, _):
        yield server


async def text_of(channel: grpc.aio.Channel) -> str:
    async with channel:
        request = pb.GenerateRequest(text=pb.Text(text="Hello"))
        return (await GenerationStub(channel).Complete(request, timeout=10)).samples[0].text


async def refused(channel: grpc.aio.Channel) -> bool:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await text_of(channel)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


def secure(server: GrpcServer, files: Path, name: str | None = None, authority: str = "authority.pem") -> Any:
    """A channel that trusts an authority, and shows a certificate if one is named."""
    pair = [(files / f"{name}.{kind}").read_bytes() for kind in ("key", "pem")] if name else (None, None)
    credentials = grpc.ssl_channel_credentials((files / authority).read_bytes(), *pair)
    return grpc.aio.secure_channel(f"127.0.0.1:{server.port}", credentials)


async def test_tls_lets_those_in_who_trust_its_authority(files):
    async with served(files) as server:
        assert await text_of(open_channel(grpc.aio, f"127.0.0.1:{server.port}", files / "authority.pem")) == "Hello"
        assert await refused(grpc.aio.insecure_channel(f"127.0.0.1:{server.port}"))
        assert await refused(secure(server, files, authority="stranger.pem"))


async def test_probes_are_plain_and_know_health_alone(files):
    async with served(files) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.probe_port}") as channel:
        health: Any = HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == serving
        assert (await health.Check(health_pb2.HealthCheckRequest(service="mimo.serve.v1.Generation"))).status == serving
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await GenerationStub(channel).Complete(pb.GenerateRequest(text=pb.Text(text="Hello")))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        watch = health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        async with asyncio.timeout(5):
            await server.stop(30)


async def test_mutual_tls_lets_those_in_whose_certificate_is_signed(files, authority):
    write(files, authority, "client")
    async with served(files, files / "authority.pem") as server:
        assert await text_of(secure(server, files, "client")) == "Hello"
        assert await refused(secure(server, files))
        assert await refused(secure(server, files, "strangers"))
        assert await refused(grpc.aio.insecure_channel(f"127.0.0.1:{server.port}"))


def test_files_that_will_not_do(files):
    certificate, key = files / CERTIFICATE, files / KEY
    encrypted = files / "encrypted.key"
    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", key, "-out", encrypted],
        check=True,
        capture_output=True,
    )
    for given, words in (
        ((certificate, files / "absent.key", None), "absent.key: cannot be read"),
        ((certificate, files, None), "cannot be read: Is a directory"),
        ((certificate, certificate, None), "expected a PEM file with a PRIVATE KEY"),
        ((key, key, None), "expected a PEM file with a CERTIFICATE"),
        ((certificate, key, key), "expected a PEM file with a CERTIFICATE"),
        ((certificate, files / "strangers.key", None), "strangers.key is no key of .*server.pem"),
        ((certificate, encrypted, None), "expected the unencrypted private key"),
    ):
        with pytest.raises(ValueError, match=words):
            server_credentials(*given)


@pytest.mark.slow
def test_a_launch_with_a_wrong_key_ends_before_anything_is_loaded(files):
    command = [sys.executable, "-m", "serve.launch_server", "--port", "0", "--ssl-certfile", files / CERTIFICATE]
    ended = subprocess.run(
        [*command, "--ssl-keyfile", files / "strangers.key"], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {files / 'strangers.key'} is no key of")
