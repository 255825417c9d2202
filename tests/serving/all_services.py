"""Every service over one engine, on one port, as a server has them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import add_SglangSchedulerServicer_to_server
from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

from mimo_jax.presets import NANO
from serve.protos.mimo.serve.v1.generation_pb2_grpc import add_GenerationServicer_to_server
from serve.services import kserve_service, scheduler_service, text_service
from serve.services.answering import Answering
from serve.services.grpc_server import GrpcServer, Service
from serve.services.requests import Requests
from tests.serving.text_server import byte_tokenizer


@asynccontextmanager
async def all_services(requests: Requests, **options: Any) -> AsyncIterator[tuple[GrpcServer, grpc.aio.Channel]]:
    """The server and a channel in plain text; options are the server's."""
    answering = Answering(requests, byte_tokenizer())
    services = [
        Service(
            scheduler_service.SERVICE_NAME,
            add_SglangSchedulerServicer_to_server,
            scheduler_service.SchedulerService(requests, NANO, NANO),
            scheduler_service.ADMIN_METHODS,
        ),
        Service(
            text_service.SERVICE_NAME,
            add_GenerationServicer_to_server,
            text_service.TextService(answering),
            text_service.ADMIN_METHODS,
        ),
        Service(
            kserve_service.SERVICE_NAME,
            add_GRPCInferenceServiceServicer_to_server,
            kserve_service.KServeService(answering),
        ),
    ]
    server = GrpcServer(requests.engine, services, "127.0.0.1:0", **options)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield server, channel
    finally:
        await server.stop(0.1)
