"""grpc.health.v1: the empty name says whether the process is alive, a service's name whether it takes requests."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from grpc.aio import ServicerContext
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health_pb2_grpc import HealthServicer

from serve.generation import Engine, NotFound, Status
from serve.services.status import statuses

_POLL_SECONDS = 0.1


class HealthService(HealthServicer):
    """Health by the engine's status.

    Args:
        engine: Whose.
        services: Full names of the services over it.
    """

    def __init__(self, engine: Engine, services: Iterable[str]) -> None:
        self._engine, self._services = engine, frozenset(services)
        self._ended = False

    def end(self) -> None:
        """Nothing is served from now on; those who watch are told so, and that it was the last word."""
        self._ended = True

    def serving(self, service: str) -> Any:
        """The status of a service, or of the process; SERVICE_UNKNOWN for other names."""
        if service and service not in self._services:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        status = self._engine.status
        fine = (status is Status.READY if service else status.alive) and not self._ended
        return pb.HealthCheckResponse.SERVING if fine else pb.HealthCheckResponse.NOT_SERVING

    async def Check(self, request: pb.HealthCheckRequest, context: ServicerContext) -> pb.HealthCheckResponse:
        """The status now."""
        status = self.serving(request.service)
        async with statuses(context):
            if status == pb.HealthCheckResponse.SERVICE_UNKNOWN:
                raise NotFound(f"no service {request.service!r} here")
            return pb.HealthCheckResponse(status=status)

    async def Watch(self, request: pb.HealthCheckRequest, context: ServicerContext) -> AsyncIterator[Any]:
        """The status now, and again whenever it changes, until the server ends."""
        last = None
        while True:
            ended, status = self._ended, self.serving(request.service)
            if status != last:
                yield pb.HealthCheckResponse(status=status)
            if ended:
                return
            last = status
            await asyncio.sleep(_POLL_SECONDS)
