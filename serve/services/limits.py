"""What one request may ask for, whichever service it comes through."""

import time
from collections.abc import Collection, Sequence

from grpc.aio import ServicerContext

from mimo_jax.slots import MAX_LOGIT_BIASES, MAX_STOP_IDS
from serve.generation import MAX_TOP_LOGPROBS, InvalidRequest

MAX_SAMPLES = 128
"""Samples of one prompt."""
MAX_STOP_STRINGS = 16
MAX_STOP_STRING = 1024
"""Characters of one."""
MAX_GRAMMAR = 1 << 20
"""Characters of a schema, an expression or a grammar."""


def deadline(context: ServicerContext, max_seconds: float | None) -> float | None:
    """`time.monotonic()` at which a call is over: the client's deadline or the server's own, whichever is first."""
    limits = [s for s in (context.time_remaining(), max_seconds) if s is not None]
    return time.monotonic() + min(limits) if limits else None


def check_limits(
    *,
    samples: int,
    stop: Sequence[str],
    stop_ids: Collection[int],
    logit_bias: Collection[int],
    grammar: str | None,
    top_logprobs: int,
    eos_ids: Collection[int],
) -> None:
    """Raise `InvalidRequest`, with what was given and what may be, if a request asks for more than it may.

    Args:
        samples: Of the prompt.
        stop: Stop strings.
        stop_ids: Stop tokens.
        logit_bias: Ids whose logits it changes.
        grammar: Of its constraint.
        top_logprobs: With every token.
        eos_ids: The model's end-of-text tokens, which share the room of stop tokens.
    """
    stops = len({*stop_ids, *eos_ids})
    for given, most, what in (
        (samples, MAX_SAMPLES, "samples of one prompt"),
        (len(stop), MAX_STOP_STRINGS, "stop strings"),
        (max(map(len, stop), default=0), MAX_STOP_STRING, "characters of a stop string"),
        (stops, MAX_STOP_IDS, "stop tokens, the model's own included"),
        (len(logit_bias), MAX_LOGIT_BIASES, "logit biases"),
        (len(grammar or ""), MAX_GRAMMAR, "characters of a grammar"),
        (top_logprobs, MAX_TOP_LOGPROBS, "top log-probabilities"),
    ):
        if given > most:
            raise InvalidRequest(f"{given} {what} are more than the {most} that a request may have")
    if samples < 1:
        raise InvalidRequest(f"a request has at least one sample, not {samples}")
