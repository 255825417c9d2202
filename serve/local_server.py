"""An engine behind gRPC on this machine, asked by a process of its own, so that asking costs the server nothing."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import asynccontextmanager
from multiprocessing import get_context
from pathlib import Path

from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import add_SglangSchedulerServicer_to_server

from serve.bench_client import Answer, Ask, Question, connected, run
from serve.generation import Engine
from serve.services.grpc_server import GrpcServer, Service
from serve.services.requests import Requests
from serve.services.scheduler_service import ADMIN_METHODS, SERVICE_NAME, SchedulerService

Asking = Callable[[Sequence[Question], Ask], Awaitable[tuple[list[Answer], float]]]
"""Sends questions all at once; gives their answers, and the seconds from the first question to the last answer."""

_CONNECT_SECONDS = 60.0


def client_process() -> ProcessPoolExecutor:
    """A process that asks; a context, which ends it."""
    return ProcessPoolExecutor(1, get_context("spawn"))  # a fork would copy JAX's and gRPC's threads


@asynccontextmanager
async def served(engine: Engine, model: Path, tokenizer: Path, client: Executor) -> AsyncIterator[Asking]:
    """Serve an engine on a free port, for one client.

    Args:
        engine: Started.
        model: Folder of the checkpoint, for who asks.
        tokenizer: Folder of the tokenizer, for who asks.
        client: That asks.
    """
    service = Service(
        SERVICE_NAME,
        add_SglangSchedulerServicer_to_server,
        SchedulerService(Requests(engine), model, tokenizer),
        ADMIN_METHODS,
    )
    server = GrpcServer(engine, [service], "127.0.0.1:0")
    await server.start()
    address, numbers = f"127.0.0.1:{server.port}", itertools.count()

    async def ask(questions: Sequence[Question], ask: Ask) -> tuple[list[Answer], float]:
        name = f"run-{next(numbers)}"
        return await asyncio.get_running_loop().run_in_executor(client, _ask, address, questions, ask, name)

    try:
        yield ask
    finally:
        await server.stop(0)


def _ask(address: str, questions: Sequence[Question], ask: Ask, name: str) -> tuple[list[Answer], float]:
    async def all_of_them() -> tuple[list[Answer], float]:
        async with connected(address, api_key=None, ca_file=None, timeout=_CONNECT_SECONDS) as server:
            together = {"concurrency": None, "rate": None, "seed": 0, "name": name, "progress": lambda _: None}
            return await run(server, questions, ask, **together)

    answers, seconds = asyncio.run(all_of_them())
    for answer in answers:
        if answer.error:
            raise RuntimeError(f"a request of the measurement failed: {answer.error}")
    return answers, seconds
