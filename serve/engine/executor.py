"""The devices' side of the engine: compiled programs around one value, `Slots`."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.model import Model
from mimo_jax.slots import admit_rows, decode_rows, draft_rows, empty_slots, prefill_rows, save_rows, verify_rows
from serve.engine.commands import Bucket, Command, CommandBuilder, all_buckets
from serve.engine.scheduler import Sizes
from serve.generation import MAX_TOP_LOGPROBS

logger = logging.getLogger(__name__)

_COMPILERS = 4
"""Programs that are compiled at a time."""


class Executor:
    """Runs commands on the devices, in order.

    Args:
        model: A loaded model.
        sizes: What there is to be room for.
        capacity: Positions a sequence may grow to.
        on_compile: Called with the seconds of every compilation, wanted or not.
    """

    def __init__(
        self, model: Model, sizes: Sizes, capacity: int, on_compile: Callable[[float], None] = lambda _: None
    ) -> None:
        self.model, self.sizes = model, sizes
        columns = -(-capacity // sizes.page_size)
        self.builder = CommandBuilder(sizes, model.config.vocab_size, model.eos_ids, columns)
        self._slots = empty_slots(
            model,
            sizes.slots * sizes.groups,
            capacity,
            page_size=sizes.page_size,
            pages=sizes.pages * sizes.groups,
            snapshots=sizes.snapshots * sizes.groups,
        )
        self._programs: dict[Bucket, Callable] = {}
        self._alone = jax.process_count() == 1
        self._on_compile = on_compile
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def close(self) -> None:
        """Stop listening to compilations."""
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._on_compile(duration_secs)

    def compile_all(self, progress: Callable[[int, int, float], None] = lambda *_: None) -> None:
        """Compile every program that a step may need.

        Args:
            progress: Called with programs done, programs in all, and seconds so far.
        """
        buckets, begun = all_buckets(self.sizes), time.monotonic()
        progress(0, len(buckets), 0.0)
        with ThreadPoolExecutor(min(_COMPILERS, os.cpu_count() or 1)) as pool:
            done = {b: pool.submit(self._compiled, b, self.builder.template(b)) for b in buckets}
            for i, _ in enumerate(as_completed(done.values())):
                progress(i + 1, len(buckets), time.monotonic() - begun)
        self._programs |= {bucket: program.result() for bucket, program in done.items()}

    def run(self, command: Command) -> Any:
        """Dispatch a program; gives its result, on the devices, without waiting for it."""
        arguments: Sequence[Any] = command.arguments
        if not self._alone:
            arguments = tuple(map(self.model.placed, arguments))
        program = self._programs.get(command.bucket)
        if program is None:
            program = self._programs[command.bucket] = self._compiled(command.bucket, command.arguments)
        self._slots, result = program(self.model.params, self._slots, *arguments)
        for leaf in jax.tree.leaves(result):
            leaf.copy_to_host_async()
        return result

    def fetch(self, result: Any) -> Any:
        """A result on the host, once it is there."""
        return jax.tree.map(np.asarray, result)

    def start_profile(self, folder: Path) -> None:
        """Record what devices and host do."""
        jax.profiler.start_trace(str(folder))

    def stop_profile(self) -> None:
        """Write what was recorded."""
        jax.profiler.stop_trace()

    def _compiled(self, bucket: Bucket, arguments: tuple[Any, ...]) -> Callable:
        statics: dict[str, Any] = {
            "admit": {},
            "save": {},
            "prefill": {"top_logprobs": MAX_TOP_LOGPROBS},
            "verify": {"top_logprobs": MAX_TOP_LOGPROBS},
            "draft": {"verify_length": self.sizes.verify_length},
            "decode": {
                "rounds": self.sizes.rounds,
                "verify_length": self.sizes.verify_length,
                "top_logprobs": MAX_TOP_LOGPROBS,
            },
        }[bucket.program]
        logger.debug("compiling %s", bucket)
        return self.model.compiled(_PROGRAMS[bucket.program], (self._slots, *arguments), statics)


_PROGRAMS: dict[str, Callable] = {
    "admit": admit_rows,
    "prefill": prefill_rows,
    "save": save_rows,
    "decode": decode_rows,
    "draft": draft_rows,
    "verify": verify_rows,
}
