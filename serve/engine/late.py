"""An engine that is still being made: ports are open, and everything says so, before weights are there."""

from collections.abc import AsyncIterator
from typing import Any

from serve.generation import Engine, EngineInfo, Event, GenerationRequest, Load, NotServing, Status


class LateEngine:
    """Stands for an engine from before it is there; see `serve.generation.Engine`."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._status = Status.STARTING
        self.progress = "starting"
        """What is being done, for who asks too early."""

    def arrive(self, engine: Engine) -> None:
        """The engine is there."""
        self._engine = engine

    def fail(self) -> None:
        """It never will be."""
        self._status = Status.FAILED

    @property
    def status(self) -> Status:
        """Where its life stands."""
        return self._engine.status if self._engine and self._status is not Status.STOPPED else self._status

    @property
    def info(self) -> EngineInfo:
        """What does not change; raises `NotServing` before it is known."""
        return self._there().info

    def load(self) -> Load:
        """How busy it is."""
        return self._engine.load() if self._engine else Load()

    def submit(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Queue a request."""
        return self._there().submit(request)

    def abort(self, request_id: str, message: str = "") -> bool:
        """End a request."""
        return self._engine.abort(request_id, message) if self._engine else False

    async def flush_cache(self) -> bool:
        """Forget all cached prefixes."""
        return await self._there().flush_cache()

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests, and end."""
        if self._engine is None:
            self._status = Status.STOPPED
            return True
        return await self._engine.drain(seconds)

    def start_profile(self, folder: str | None = None) -> str:
        """Begin to record."""
        return self._there().start_profile(folder)

    def stop_profile(self) -> None:
        """End it."""
        self._there().stop_profile()

    def _there(self) -> Any:
        if self._engine is None:
            raise NotServing(f"the server is not ready yet: {self.progress}")
        return self._engine
