"""A request's events on their way from the engine's thread to who asked."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from serve.generation import EngineFailed, Event, Finished


class EventStream(AsyncIterator[Event]):
    """Iterates a request's events; closing it early calls `abandon` once.

    Belongs to the event loop in which it is made.

    Args:
        samples: Ends after so many are finished.
        abandon: Told that nobody listens any more.
    """

    def __init__(self, samples: int, abandon: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event | EngineFailed] = asyncio.Queue()
        self._left, self._abandon = samples, abandon
        self._over = False

    def put(self, events: Iterable[Event | EngineFailed]) -> None:
        """Hand events over; only from the event loop."""
        for event in events:
            self._queue.put_nowait(event)

    async def __anext__(self) -> Event:
        """The next event."""
        if self._over:
            raise StopAsyncIteration
        try:
            event = await self._queue.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(event, EngineFailed):
            self._over = True
            raise event
        if isinstance(event, Finished):
            self._left -= 1
            self._over = not self._left
        return event

    async def aclose(self) -> None:
        """Stop listening; what is left of the request is aborted."""
        if not self._over:
            self._over = True
            self._abandon()
