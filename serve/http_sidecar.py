"""What probes, Prometheus and people ask over HTTP, beside the gRPC port: no request is ever served here."""

import json
from dataclasses import asdict
from typing import Any

from aiohttp import web

from serve.generation import Engine, NotServing, Status
from serve.metrics import CONTENT_TYPE, Metrics


class HttpSidecar:
    """An HTTP server in the event loop of the services, from before the engine is there.

    `/live`: 200 while the process is worth keeping, which starting and draining ones are, and stalled or failed ones
    are not. `/ready` and `/health`: 200 while requests are taken. Both look at the engine's status and generate
    nothing. `/metrics`: for Prometheus. `/info`: what is served and how busy it is, as JSON.

    Args:
        engine: Asked at every look; one that is still being made raises `NotServing` where it does not know.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._metrics: Metrics | None = None
        app = web.Application()
        pages = {
            "/live": self._live,
            "/ready": self._ready,
            "/health": self._ready,
            "/metrics": self._text,
            "/info": self._info,
        }
        app.router.add_routes([web.get(path, page) for path, page in pages.items()])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)

    def show(self, metrics: Metrics) -> None:
        """From now on, `/metrics` shows these; before, it says that there are none yet."""
        self._metrics = metrics

    async def start(self, host: str, port: int) -> int:
        """Listen; gives the port, which the system chooses for 0.

        Raises:
            OSError: The port is taken, or the address is none of this machine's.
        """
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"cannot serve HTTP on {host}:{port}: {reason}; choose another port with --http-port"
            ) from None
        return self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening. To be called last: probes want to know of a server that drains."""
        await self._runner.cleanup()

    async def _live(self, request: web.Request) -> web.Response:
        return self._answer(self._engine.status.alive)

    async def _ready(self, request: web.Request) -> web.Response:
        return self._answer(self._engine.status is Status.READY)

    def _answer(self, good: bool) -> web.Response:
        return web.Response(text=f"{self._engine.status.value}\n", status=200 if good else 503)

    async def _text(self, request: web.Request) -> web.Response:
        if self._metrics is None:
            return web.Response(text="no metrics yet: the server is starting\n", status=503)
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _info(self, request: web.Request) -> web.Response:
        shown: dict[str, Any] = {"status": self._engine.status.value}
        try:
            shown |= {"info": asdict(self._engine.info), "load": asdict(self._engine.load())}
        except NotServing as error:
            shown["message"] = str(error)
        return web.json_response(shown, dumps=lambda value: json.dumps(value, indent=2, default=str) + "\n")
