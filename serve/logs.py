"""Log lines of the server, for people or for machines, with the request they are about."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import IO, Any

from serve.generation import Finished, GenerationRequest

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_NOISY = ("jax", "absl", "filelock", "urllib3", "aiohttp.access")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "request_id"}


def configure(
    *, level: int = logging.INFO, json_lines: bool = False, rank: int | None = None, stream: IO[str] | None = None
) -> None:
    """Send everything that is logged to one place, once for the process.

    Args:
        level: The least that is shown; libraries that say much begin at warnings.
        json_lines: One JSON object a line rather than text. Either shows what came with a line as `extra`.
        rank: Of this process among several, shown in every line.
        stream: Standard error by default; standard output is for results.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines(rank) if json_lines else _Lines(rank))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


@contextmanager
def about(request_id: str) -> Iterator[None]:
    """Within, and in tasks begun within, lines are about this request.

    Elsewhere, such as in the engine's thread, give `extra={"request_id": ...}` with the line.
    """
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


class RequestLog:
    """Two lines a request: that it came and how it ended.

    Args:
        contents: Also show prompts and outputs, which are nobody's business unless the operator asks for them
            (`--log-requests`).
    """

    def __init__(self, contents: bool = False) -> None:
        self._contents, self._logger = contents, logging.getLogger("serve.requests")

    def received(self, request: GenerationRequest) -> None:
        """A request that the engine took."""
        fields: dict[str, Any] = {
            "request_id": request.request_id,
            "prompt_tokens": len(request.prompt_ids),
            "max_new_tokens": request.sampling.max_new_tokens,
        }
        if self._contents:
            fields["prompt"] = list(request.prompt_ids) if request.text is None else request.text
        self._logger.info("received", extra=fields)

    def finished(self, request_id: str, end: Finished, seconds: float, output: Any = None) -> None:
        """The end of one of its samples, with its ids."""
        usage = end.usage
        fields: dict[str, Any] = {
            "request_id": request_id,
            "index": end.index,
            "reason": end.reason,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "accepted_length": round(usage.accepted / usage.rounds + 1, 2) if usage.rounds else 0.0,
            "seconds": round(seconds, 3),
        }
        if self._contents:
            fields["output"] = output
        self._logger.info("finished", extra=fields)


class _Lines(logging.Formatter):
    """`2026-01-31 09:00:00.123 INFO [rank 1] serve.engine: message, key=value [request abc]`."""

    def __init__(self, rank: int | None) -> None:
        place = "" if rank is None else f"[rank {rank}] "
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)s {place}%(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = [f"{key}={value!r}" for key, value in _extra(record).items()]
        line = ", ".join([super().formatMessage(record), *fields])
        request_id = _about(record)
        return line if request_id is None else f"{line} [request {_printable(request_id)}]"


class _JsonLines(logging.Formatter):
    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self._rank = {} if rank is None else {"rank": rank}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **self._rank,
            "message": record.getMessage(),
        }
        line |= _extra(record)
        if (request_id := _about(record)) is not None:
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What came with a line by name."""
    return {key: value for key, value in vars(record).items() if key not in _OWN}


def _about(record: logging.LogRecord) -> str | None:
    """The request a line is about; a formatter runs in the thread and the context that logged it."""
    return getattr(record, "request_id", None) or _request_id.get()


def _printable(text: str) -> str:
    """A client's own id, in which a line break would begin a line that nobody logged."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])
