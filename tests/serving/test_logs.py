"""Log lines: what is in them, and what is not."""

import asyncio
import io
import json
import logging
import warnings
from dataclasses import replace

import pytest

from mimo_jax.request import SamplingParams
from serve import logs
from serve.generation import Finished, GenerationRequest, Usage

logger = logging.getLogger("serve.test_logs")


@pytest.fixture
def lines():
    """Configures logging into a list of lines, and puts everything back."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level, quiet = root.handlers[:], root.level, {n: logging.getLogger(n).level for n in logs._NOISY}

    def configured(**how):
        logs.configure(stream=stream, **how)
        return lambda: stream.getvalue().splitlines()

    for handler in handlers:  # the test runner's own would be closed
        root.removeHandler(handler)
    yield configured
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, was in quiet.items():
        logging.getLogger(name).setLevel(was)


def test_lines_for_people(lines):
    read = lines(rank=3)
    logger.info("loaded %d layers", 70)
    logger.debug("too much")
    logging.getLogger("jax").info("too much")
    with logs.about("abc"):
        logger.warning("slow")
    logger.info("of another thread", extra={"request_id": "x\nINFO forged"})
    first, second, third = read()
    assert first.endswith(" INFO [rank 3] serve.test_logs: loaded 70 layers")
    assert second.endswith(" WARNING [rank 3] serve.test_logs: slow [request abc]")
    assert third.endswith("of another thread [request x?INFO forged]")


def test_lines_for_machines(lines):
    read = lines(json_lines=True, rank=0)
    with logs.about("a\nb"):
        logger.info("two\nlines", extra={"seconds": 1.5, "where": {"page": 3}})
    try:
        raise KeyError("missing")
    except KeyError:
        logger.exception("it broke")
    first, second = map(json.loads, read())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "serve.test_logs",
        "rank": 0,
        "message": "two\nlines",
        "seconds": 1.5,
        "where": {"page": 3},
        "request_id": "a\nb",
    }
    assert "KeyError: 'missing'" in second["exception"]
    assert "request_id" not in second


def test_warnings_are_logged(lines):
    read = lines()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # inside, as the context manager has replaced what it replaces
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    assert "DeprecationWarning: old" in read()[0]


async def test_tasks_do_not_mix_their_requests(lines):
    read = lines(json_lines=True)

    async def serve(name):
        with logs.about(name):
            await asyncio.sleep(0)
            await asyncio.create_task(inner(name))

    async def inner(name):
        await asyncio.sleep(0)
        logger.info(name)

    await asyncio.gather(*(serve(f"r{i}") for i in range(20)))
    found = [json.loads(line) for line in read()]
    assert len(found) == 20
    assert all(line["request_id"] == line["message"] for line in found)


REQUEST = GenerationRequest("r1", (5, 6, 7), SamplingParams(max_new_tokens=9))
END = Finished(0, "stop", Usage(3, 2, 8, 2, 14, 5))


@pytest.mark.parametrize("json_lines", [False, True])
@pytest.mark.parametrize("contents", [False, True])
def test_contents_are_logged_only_where_asked_for(lines, json_lines, contents):
    read = lines(json_lines=json_lines)
    log = logs.RequestLog(contents)
    log.received(replace(REQUEST, text="my secret"))
    log.received(REQUEST)
    log.finished("r1", END, 0.25, "another secret")
    text = "\n".join(read())
    assert text.count("secret") == (2 if contents else 0)
    assert ("[5, 6, 7]" in text) == contents
    if json_lines:
        came, _, ended = map(json.loads, read())
        assert (came["message"], came["request_id"], came["prompt_tokens"]) == ("received", "r1", 3)
        assert (ended["message"], ended["reason"], ended["accepted_length"]) == ("finished", "stop", 3.5)
    else:
        assert "received, prompt_tokens=3, max_new_tokens=9" in text
        assert "accepted_length=3.5, seconds=0.25" in text
