"""The gRPC server: services, health, reflection, keys and ports put together."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from serve.channel import MAX_MESSAGE_BYTES
from serve.generation import Engine
from serve.services.decoding import DecodingInterceptor
from serve.services.health import HealthService
from serve.services.security import KeyInterceptor

_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # clients in Go ping every ten seconds; Python's default of five minutes would cut them off
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
]


@dataclass(frozen=True)
class Service:
    """A service to be served."""

    name: str
    """In full, as health and reflection know it."""
    add: Any
    """The stub's `add_..._to_server`."""
    servicer: Any
    admin_methods: Collection[str] = ()


class GrpcServer:
    """Services over one engine, on one port.

    Args:
        engine: For health.
        services: What is served.
        address: Host and port; port 0 is any that is free.
        credentials: TLS; None: plain text.
        api_key: See `KeyInterceptor`.
        admin_key: See `KeyInterceptor`.
    """

    def __init__(
        self,
        engine: Engine,
        services: Sequence[Service],
        address: str,
        *,
        credentials: grpc.ServerCredentials | None = None,
        api_key: str | None = None,
        admin_key: str | None = None,
    ) -> None:
        self._services = services
        self._health = HealthService(engine, [service.name for service in services])
        self._address, self._credentials = address, credentials
        admin = {method for service in services for method in service.admin_methods}
        self._keys = KeyInterceptor(api_key, admin_key, admin)
        self._server: grpc.aio.Server | None = None
        self.port = 0
        """Where it listens, once it does."""
        self.probe_port = 0
        """Where health is answered in plain text, on this machine alone; the same port without TLS."""

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The port cannot be had.
        """
        self._server = self._build(self._services)
        try:
            if self._credentials:
                self.port = self._server.add_secure_port(self._address, self._credentials)
                # probes of Kubernetes speak plain text only
                self._probes: Any = self._build(())
                self.probe_port = self._probes.add_insecure_port("127.0.0.1:0")
                await self._probes.start()
            else:
                self.port = self.probe_port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}: {error}; is the port taken?") from None
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """End: calls that are open have so many seconds; those that watch health need none."""
        self._health.end()
        if self._server is not None:
            await self._server.stop(grace)
        if self._credentials and self.probe_port:
            await self._probes.stop(grace)

    def _build(self, services: Sequence[Service]) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[self._keys, DecodingInterceptor()], options=_OPTIONS)
        for service in services:
            service.add(service.servicer, server)
        add_HealthServicer_to_server(self._health, server)
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        known = [*(service.name for service in services), health, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(known, server)
        return server
