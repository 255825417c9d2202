"""From options to an engine: weights, sizes, programs."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from mimo_jax.model import Model, load_model
from mimo_jax.progress import loading_bar
from mimo_jax.tokenizer import Tokenizer
from serve.engine.batching import BatchingEngine
from serve.engine.budget import plan_sizes
from serve.engine.commands import Command, all_buckets
from serve.engine.executor import Executor
from serve.engine.followers import LeadingExecutor
from serve.generation import EngineInfo
from serve.metrics import Metrics
from serve.options import ServerOptions
from sharding.distributed import agree

logger = logging.getLogger(__name__)

_ALIKE = (
    "platform",
    "context_length",
    "page_size",
    "max_running_requests",
    "chunked_prefill_size",
    "block_size",
    "verify_length",
    "rounds_per_dispatch",
    "mem_fraction_static",
    "max_total_tokens",
    "max_snapshots",
    "disable_radix_cache",
)
"""Options that programs follow from, besides those that weights are loaded by: every process has the same."""


@dataclass(frozen=True)
class Built:
    """An engine that waits to be started, and what it is made of."""

    engine: BatchingEngine
    model: Model
    leading: LeadingExecutor | None


def build_executor(
    options: ServerOptions, say: Callable[[str], None], on_compile: Callable[[float], None] = lambda _: None
) -> tuple[Executor, float]:
    """Load the model and make room on the devices; also gives the seconds that loading took.

    Args:
        options: Of the server.
        say: Told what is being done, for people.
        on_compile: See `Executor`.
    """
    begun = time.monotonic()
    agree({name: getattr(options, name) for name in _ALIKE})
    say("loading weights")
    with loading_bar() as bar:

        def report(component: str, done: int, total: int) -> None:
            say(f"loading {component}: {done / max(total, 1):.0%} of {total / 1e9:.1f} GB")
            bar(component, done, total)

        model = load_model(options.model, options.load, report)
    seconds = time.monotonic() - begun
    sizes = plan_sizes(model, options)
    logger.info(
        "%d slots, %d pages of %d tokens and %d snapshots in each of %d groups",
        sizes.slots,
        sizes.pages,
        sizes.page_size,
        sizes.snapshots,
        sizes.groups,
    )
    return Executor(model, sizes, options.context_length, on_compile), seconds


def build_engine(
    options: ServerOptions,
    metrics: Metrics,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
    failed: Callable[[BaseException], None],
) -> Built:
    """Everything up to compiled programs; takes as long as it takes.

    Args:
        options: Of the server.
        metrics: Of the engine.
        tokenizer: That text is read and written with, if there is one.
        say: Told what is being done, for people.
        failed: See `BatchingEngine`.
    """
    begun, ready = time.monotonic(), [False]

    def compiled(seconds: float) -> None:
        metrics.compiled(seconds, ready[0])
        if ready[0]:
            logger.error("a program was compiled while serving, in %.1f s: that should never happen", seconds)

    executor, seconds = build_executor(options, say, compiled)
    metrics.loaded(seconds)
    model, sizes = executor.model, executor.sizes
    leading = LeadingExecutor(executor, options.group.address.rsplit(":", 1)[0]) if options.group else None
    device = leading or executor
    info = EngineInfo(
        model=options.served_model_name,
        vocab_size=model.config.vocab_size,
        eos_ids=model.eos_ids,
        context_length=options.context_length,
        max_running=sizes.slots * sizes.groups,
        max_queued=options.max_queued_requests,
        page_size=sizes.page_size,
        block_size=sizes.verify_length,
        architecture="MiMoV2ForCausalLM",
        settings=options.as_json(),
    )
    engine = BatchingEngine(
        device,
        info,
        metrics,
        tokenizer,
        overlap=options.overlap,
        watchdog=options.watchdog_timeout,
        failed=failed,
    )
    if options.precompile:

        def progress(done: int, total: int, seconds: float) -> None:
            left = f", about {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
            say(f"compiled {done} of {total} programs{left}")

        executor.compile_all(progress)
        for bucket in all_buckets(sizes):  # each once, on nothing: first calls are slow
            device.fetch(device.run(Command(bucket, executor.builder.template(bucket))))
    ready[0] = options.precompile
    metrics.started(time.monotonic() - begun)
    return Built(engine, model, leading)
