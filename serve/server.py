"""The server's life: ports open, weights load, programs compile, requests are answered, until it is told to end."""

import asyncio
import logging
import os
import signal
from contextlib import nullcontext

from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import add_SglangSchedulerServicer_to_server

from mimo_jax.tokenizer import Tokenizer
from serve.constraint import ConstraintCompiler
from serve.engine.building import Built, build_engine, build_executor
from serve.engine.followers import follow
from serve.engine.late import LateEngine
from serve.http_sidecar import HttpSidecar
from serve.logs import RequestLog
from serve.metrics import Metrics
from serve.options import ServerOptions
from serve.protos.mimo.serve.v1.generation_pb2_grpc import add_GenerationServicer_to_server
from serve.sampling_defaults import sampling_defaults
from serve.services import scheduler_service, text_service
from serve.services.answering import Answering
from serve.services.grpc_server import GrpcServer, Service
from serve.services.requests import Requests
from serve.services.scheduler_service import SchedulerService
from serve.services.security import server_credentials
from serve.services.text_service import TextService
from serve.tracing import Tracer
from sharding.distributed import joined

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 2.0
"""For calls that are still open once every request is answered, such as health watches."""


def run(options: ServerOptions) -> int:
    """Serve until told to end, or follow the process that serves; the exit status."""
    if options.group:
        logger.info("%s", options.group)
    with joined(options.group, options.dist_timeout) if options.group else nullcontext():
        if options.process:
            # those who end the group tell all of it; this process has to be there until the first has ended
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            executor, _ = build_executor(options, logger.info)
            if options.precompile:
                executor.compile_all()
            follow(executor)
            return 0
        return asyncio.run(_Server(options).serve())


def _tokenizer(options: ServerOptions) -> Tokenizer | None:
    """The one that text is read and written with, if there is one."""
    there = (options.tokenizer / "tokenizer.json").is_file()
    return Tokenizer.from_folder(options.tokenizer) if there else None


def _kserve(answering: Answering) -> list[Service]:
    """The KServe service, where its stubs are installed."""
    try:
        from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

        from serve.services import kserve_service
    except ImportError:
        return []
    servicer = kserve_service.KServeService(answering)
    return [Service(kserve_service.SERVICE_NAME, add_GRPCInferenceServiceServicer_to_server, servicer)]


class _Server:
    """One serving process."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.engine = LateEngine()
        self._ending = asyncio.Event()
        self._failure: BaseException | None = None

    async def serve(self) -> int:
        """All of it; the exit status."""
        options = self.options
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        metrics = Metrics(
            options.served_model_name, self.engine.load, options.verify_length - 1, prefix=options.metrics_prefix
        )
        tokenizer = _tokenizer(options)
        sidecar = HttpSidecar(self.engine)
        sidecar.show(metrics)
        ending = asyncio.create_task(self._ending.wait())
        grpc: GrpcServer | None = None
        endpoint = options.otlp_traces_endpoint
        tracer = Tracer(endpoint, options.served_model_name) if endpoint else None
        try:
            requests = Requests(
                self.engine,
                seed=options.random_seed,
                max_seconds=options.max_request_seconds,
                log=RequestLog(options.log_requests),
                tracer=tracer,
            )
            service = SchedulerService(
                requests, options.model, options.tokenizer, stream_interval=options.stream_interval
            )
            services = [
                Service(
                    scheduler_service.SERVICE_NAME,
                    add_SglangSchedulerServicer_to_server,
                    service,
                    scheduler_service.ADMIN_METHODS,
                )
            ]
            if tokenizer is not None:
                defaults = sampling_defaults(options.model, options.sampling_defaults)
                answering = Answering(requests, tokenizer, defaults, stream_interval=options.stream_interval)
                text = TextService(answering)
                services.append(
                    Service(
                        text_service.SERVICE_NAME,
                        add_GenerationServicer_to_server,
                        text,
                        text_service.ADMIN_METHODS,
                    )
                )
                services += _kserve(answering)
            grpc = self._grpc(services)
            await grpc.start()
            http = await sidecar.start(options.host, options.http_port or (grpc.port + 1 if options.grpc_port else 0))
            logger.info("gRPC on %s:%d, HTTP on port %d; not ready yet", options.host, grpc.port, http)
            building = asyncio.create_task(
                asyncio.to_thread(build_engine, options, metrics, tokenizer, self._say, self._failed)
            )
            await asyncio.wait({building, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not building.done():
                logger.warning("told to end before the server was ready")
                os._exit(0)  # a compiler cannot be interrupted
            built: Built = building.result()
            if options.grammar_backend != "none" and tokenizer is not None:
                requests.compiler = ConstraintCompiler(tokenizer, built.model.config.vocab_size, built.model.eos_ids)
            built.engine.start()
            self.engine.arrive(built.engine)
            logger.info("ready: %s on %s:%d", options.served_model_name, options.host, grpc.port)
            await ending
            if self._failure is None:
                logger.info("draining, for at most %.0f s", options.drain_timeout)
                if not await self.engine.drain(options.drain_timeout):
                    logger.warning("some requests were not finished in time and were aborted")
                if built.leading:
                    built.leading.close()
        finally:
            if grpc is not None:
                await grpc.stop(_GRACE_SECONDS)
            await sidecar.stop()
            if tracer is not None:
                tracer.shutdown()
        if self._failure is not None:
            raise RuntimeError("the engine failed") from self._failure
        return 0

    def _grpc(self, services: list[Service]) -> GrpcServer:
        options = self.options
        credentials = None
        if options.ssl_certfile and options.ssl_keyfile:
            credentials = server_credentials(options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs)
        return GrpcServer(
            self.engine,
            services,
            f"{options.host}:{options.grpc_port}",
            credentials=credentials,
            api_key=options.api_key,
            admin_key=options.admin_api_key,
        )

    def _say(self, what: str) -> None:
        if what.split(":")[0] != self.engine.progress.split(":")[0]:
            logger.info("%s", what)
        self.engine.progress = what

    def _failed(self, error: BaseException) -> None:
        """The engine's thread died."""
        self._failure = error
        self.engine.fail()
        self._loop.call_soon_threadsafe(self._ending.set)

    def _signalled(self, number: int) -> None:
        if self._ending.is_set():
            logger.warning("%s again: ending now", signal.Signals(number).name)
            os._exit(1)
        logger.info("%s: ending once what is being answered is", signal.Signals(number).name)
        self._ending.set()
