"""What probes, Prometheus and people ask over HTTP, beside the gRPC port: no request is ever served here."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from aiohttp import web

from serve.generation import Engine, Status
from serve.metrics import CONTENT_TYPE, Metrics

_ALIVE = frozenset({Status.STARTING, Status.READY, Status.DRAINING})


class HttpSidecar:
    """An HTTP server in the event loop of the services.

    `/live`: 200 while the process is worth keeping, which starting and draining ones are, and stalled or failed ones
    are not. `/ready` and `/health`: 200 while requests are taken. Both look at the engine's status and generate
    nothing. `/metrics`: for Prometheus. `/info`: what is served and how busy it is, as JSON.

    Args:
        status: Where the server's life stands; asked at every probe.
        metrics: What `/metrics` shows; without it there is no such page.
    """

    def __init__(self, status: Callable[[], Status], metrics: Metrics | None = None) -> None:
        self._status, self._metrics = status, metrics
        self._engine: Engine | None = None
        app = web.Application()
        pages = {"/live": self._live, "/ready": self._ready, "/health": self._ready, "/info": self._info}
        if metrics is not None:
            pages["/metrics"] = self._text
        app.router.add_routes([web.get(path, page) for path, page in pages.items()])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)

    def attach(self, engine: Engine) -> None:
        """Show this engine under `/info`. The sidecar runs before there is one: loading takes minutes."""
        self._engine = engine

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
        return self._answer(self._status(), _ALIVE)

    async def _ready(self, request: web.Request) -> web.Response:
        return self._answer(self._status(), {Status.READY})

    def _answer(self, status: Status, good: frozenset[Status] | set[Status]) -> web.Response:
        return web.Response(text=f"{status.value}\n", status=200 if status in good else 503)

    async def _text(self, request: web.Request) -> web.Response:
        assert self._metrics is not None
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _info(self, request: web.Request) -> web.Response:
        shown: dict[str, Any] = {"status": self._status().value}
        if self._engine is not None:
            shown |= {"info": asdict(self._engine.info), "load": asdict(self._engine.load())}
        return web.json_response(shown, dumps=lambda value: json.dumps(value, indent=2, default=str) + "\n")
