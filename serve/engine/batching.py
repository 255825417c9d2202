"""The engine: a thread that plans steps, dispatches them, and hands out what comes back.

While the devices work on one step, the next one is planned and dispatched; only then are the results of the first
fetched. What a step gives a request does not depend on when it was planned, so waiting for each step gives the same.
"""

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mimo_jax.request import check_requests
from mimo_jax.speculative import Rounds
from mimo_jax.tokenizer import Tokenizer
from serve.engine.commands import Command, CommandBuilder
from serve.engine.scheduler import Row, Scheduler, Sizes, Step
from serve.engine.sequence import Sequence, Stage
from serve.engine.stops import StopWatcher
from serve.engine.stream import EventStream
from serve.generation import (
    MAX_TOP_LOGPROBS,
    DuplicateRequest,
    EngineFailed,
    EngineInfo,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    InvalidRequest,
    Load,
    NotServing,
    QueueFull,
    Refused,
    RoundTokens,
    Status,
    TokenLogprobs,
)
from serve.metrics import Metrics

logger = logging.getLogger(__name__)


class Device(Protocol):
    """What runs commands (see `Executor`)."""

    sizes: Sizes
    builder: CommandBuilder

    def run(self, command: Command) -> Any:
        """Dispatch a program, without waiting for it."""
        ...

    def fetch(self, result: Any) -> Any:
        """A result on the host."""
        ...

    def start_profile(self, folder: Path) -> None:
        """Begin to record."""
        ...

    def stop_profile(self) -> None:
        """End it."""
        ...


@dataclass
class _Flight:
    """A dispatched program whose result somebody waits for."""

    result: Any
    """`Rounds`."""
    of: list[Sequence | None]
    tokens: int
    """Real ones that the program worked on."""
    padded: int
    rounds: int
    """Verify passes; 0: a prefill."""
    begun: float


@dataclass
class _Live:
    """A request inside."""

    stream: EventStream
    sequences: list[Sequence] = field(default_factory=list)


class BatchingEngine:
    """Continuous batching over one `Device`; see `serve.generation.Engine` for what services may call.

    Args:
        device: Ready to run: compiled.
        info: What services are told.
        metrics: What is counted.
        tokenizer: Finds stop strings; None: a request may have none.
        overlap: Whether a step is planned while the one before it runs.
        watchdog: Seconds without a finished step, while there is work, after which the engine counts as stalled.
        failed: Called, in the engine's thread, with the error the engine died of.
    """

    def __init__(
        self,
        device: Device,
        info: EngineInfo,
        metrics: Metrics,
        tokenizer: Tokenizer | None = None,
        *,
        overlap: bool = True,
        watchdog: float = 300.0,
        failed: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self.info = info
        self._device, self._metrics, self._tokenizer = device, metrics, tokenizer
        self._overlap, self._watchdog, self._failed = overlap, watchdog, failed
        self._scheduler = Scheduler(device.sizes)
        self._status = Status.STARTING
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._live: dict[str, _Live] = {}
        self._arrivals = 0
        self._flights: deque[list[_Flight]] = deque()
        self._outbox: dict[EventStream, list[Event | EngineFailed]] = defaultdict(list)
        self._beat = time.monotonic()
        self._retracted = 0
        self._profile: Path | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # what services call, in the event loop

    def start(self) -> None:
        """Begin to serve."""
        self._status = Status.READY
        self._thread.start()

    @property
    def status(self) -> Status:
        """Where its life stands."""
        if self._status is Status.READY and self._live and time.monotonic() - self._beat > self._watchdog:
            return Status.STALLED
        return self._status

    def load(self) -> Load:
        """How busy it is."""
        return self._scheduler.load()

    def submit(self, request: GenerationRequest) -> EventStream:
        """Queue a request (see `serve.generation.Engine`)."""
        self._check(request)
        stream = EventStream(request.n, lambda: self._abandon(live))
        live = _Live(stream)
        now, leader = time.monotonic(), None
        for index in range(request.n):
            self._arrivals += 1
            sampling = replace(request.sampling, seed=(request.sampling.seed + index * 0x9E3779B1) % (1 << 32))
            sequence = Sequence(request, index, sampling, self._arrivals, leader=leader, queued_at=now)
            leader = leader or sequence
            if request.constraint is not None:
                sequence.constraint = request.constraint.copy()
            if sampling.stop and self._tokenizer is not None:
                sequence.watcher = StopWatcher(self._tokenizer, sampling.stop)
            live.sequences.append(sequence)
        self._live[request.request_id] = live  # whole: the engine's thread looks at it from now on
        self._metrics.queued()
        self._send(lambda: self._enqueue(live))
        return stream

    def abort(self, request_id: str, message: str = "") -> bool:
        """End a request (see `serve.generation.Engine`)."""
        if request_id not in self._live:
            return False
        self._send(lambda: self._abort(request_id, "abort", message))
        return True

    async def flush_cache(self) -> bool:
        """Forget all cached prefixes, if nobody is inside."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        answer: list[bool] = []

        def flush() -> None:
            answer.append(not self._flights and self._scheduler.flush())
            loop.call_soon_threadsafe(done.set)

        self._send(flush)
        await done.wait()
        return answer[0]

    async def drain(self, seconds: float) -> bool:
        """Finish what is inside, refuse the rest, and end."""
        if self._status in (Status.READY, Status.STARTING):
            self._status = Status.DRAINING
        until = time.monotonic() + seconds
        while self._live and time.monotonic() < until and self._thread.is_alive():
            await asyncio.sleep(0.01)
        clean = not self._live
        for request_id in list(self._live):
            self.abort(request_id, "the server is stopping")
        while self._live and self._thread.is_alive():
            await asyncio.sleep(0.01)
        if self._status is not Status.FAILED:
            self._status = Status.STOPPED
        self._send(lambda: None)
        return clean

    def start_profile(self, folder: str | None = None) -> str:
        """Begin to record what the devices do."""
        if self._profile is not None:
            raise Refused(f"a profile is being recorded into {self._profile}; stop it first")
        self._profile = Path(folder or f"profile-{time.strftime('%Y%m%d-%H%M%S')}")
        self._device.start_profile(self._profile)
        return str(self._profile)

    def stop_profile(self) -> None:
        """Write what was recorded."""
        if self._profile is None:
            raise Refused("no profile is being recorded")
        self._profile = None
        self._device.stop_profile()

    def check(self) -> None:
        """Raise unless slots, pages and snapshots are all accounted for; only while nothing is inside."""
        self._scheduler.check()

    def _check(self, request: GenerationRequest) -> None:
        if self._status is not Status.READY:
            raise NotServing(f"the server is {self._status.value}, and takes no requests")
        if request.request_id in self._live:
            raise DuplicateRequest(f"request {request.request_id!r} is still being answered; ids must be unique")
        inside, most = sum(len(live.sequences) for live in list(self._live.values())), self.info.max_queued
        if inside + request.n > most + self.info.max_running:
            self._metrics.refused("RESOURCE_EXHAUSTED")
            raise QueueFull(f"{inside} samples wait or run, and {most} may wait; try again later", 1.0)
        try:
            check_requests([request.prompt_ids], [request.sampling], self.info.vocab_size, self.info.context_length)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        sizes, length = self._device.sizes, len(request.prompt_ids) + request.sampling.max_new_tokens
        if length > sizes.pages * sizes.page_size:
            raise InvalidRequest(
                f"prompt and new tokens need {length} positions, and all pages together hold "
                f"{sizes.pages * sizes.page_size}; shorten the prompt or lower max_new_tokens"
            )
        if request.top_logprobs > MAX_TOP_LOGPROBS:
            raise InvalidRequest(f"top_logprobs may be {MAX_TOP_LOGPROBS} at most, not {request.top_logprobs}")
        if request.sampling.stop and self._tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and this model has none; use stop_token_ids")

    def _abandon(self, live: _Live) -> None:
        request_id = live.sequences[0].request.request_id

        def abort() -> None:
            # it may have finished, unheard, and its id be another request's by now
            if self._live.get(request_id) is live:
                self._abort(request_id, "abort", "the client went away")

        self._send(abort)

    def _send(self, act: Callable[[], None]) -> None:
        """Have the engine's thread do something before its next step."""
        with self._wake:
            self._inbox.append(act)
            self._wake.notify()

    # the engine's thread

    def _run(self) -> None:
        try:
            while self._status is not Status.STOPPED:
                self._take_in()
                self._step()
                self._deliver()
        except BaseException as error:
            logger.exception("the engine failed")
            self._status = Status.FAILED
            for live in list(self._live.values()):
                self._outbox[live.stream].append(EngineFailed(f"the engine failed: {type(error).__name__}"))
            self._live.clear()
            self._deliver()
            self._failed(error)

    def _take_in(self) -> None:
        with self._wake:
            idle = not self._flights and not self._scheduler.running and not self._scheduler.waiting
            if idle and not self._inbox and self._status is not Status.STOPPED:
                self._wake.wait(1.0)
            acts, self._inbox = list(self._inbox), deque()
            if idle:
                self._beat = time.monotonic()
        for act in acts:
            act()
        now = time.monotonic()
        for request_id, live in list(self._live.items()):
            deadline = live.sequences[0].request.deadline
            if deadline is not None and now > deadline:
                self._abort(request_id, "deadline", "")

    def _enqueue(self, live: _Live) -> None:
        for sequence in live.sequences:
            if sequence.stage is not Stage.FINISHED:
                self._scheduler.add(sequence)

    def _abort(self, request_id: str, reason: FinishReason, message: str) -> None:
        for sequence in list(live.sequences) if (live := self._live.get(request_id)) else []:
            self._finish(sequence, reason, message=message)

    def _step(self) -> None:
        step = self._scheduler.plan()
        if self._scheduler.retractions > self._retracted:
            self._metrics.retracted(self._scheduler.retractions - self._retracted)
            self._retracted = self._scheduler.retractions
        if step:
            self._flights.append(self._dispatch(step))
        ahead = 1 if self._overlap and step and not step.constrained else 0
        while len(self._flights) > ahead:
            self._land(self._flights.popleft())

    def _dispatch(self, step: Step) -> list[_Flight]:
        run, build, flights = self._device.run, self._device.builder, []
        for save in step.kept:
            run(build.save(save))
        for admission in step.admissions:
            sequence = admission.sequence
            if not sequence.admitted_at:
                sequence.admitted_at = time.monotonic()
                if sequence.request.trace is not None and not sequence.index:
                    sequence.request.trace.prefilling()
            run(build.admit(admission))
        if step.constrained:
            command, drafting = build.decode(step.constrained, "draft")
            drafts = run(command)
        if step.prefill:
            command, of = build.prefill(step.prefill, step.prefill_size, self._first_mask)
            last = {id(row.sequence) for row in step.prefill if row.last}
            waiting = [s if s is not None and id(s) in last else None for s in of]
            flights.append(self._flight(command, waiting, sum(row.count for row in step.prefill), 0))
            for save in step.saves:
                run(build.save(save))
        if step.decode:
            command, of = build.decode(step.decode)
            length, rounds = self._device.sizes.verify_length, self._device.sizes.rounds
            flights.append(self._flight(command, of, len(step.decode) * length * rounds, rounds))
        if step.constrained:
            flights.append(self._constrained(step.constrained, drafting, self._device.fetch(drafts)))
        return flights

    def _flight(self, command: Command, of: list, tokens: int, rounds: int) -> _Flight:
        begun = time.monotonic()
        bucket, length = command.bucket, self._device.sizes.verify_length
        padded = bucket.rows * self._device.sizes.groups * (bucket.tokens or length * rounds)
        return _Flight(self._device.run(command), of, tokens, padded - tokens, rounds, begun)

    def _first_mask(self, row: Row) -> Any:
        constraint = row.sequence.constraint
        if constraint is None:
            return None
        masks = self._device.builder.no_masks(1, 1)[0]
        self._masked(row.sequence, [], masks)
        return masks[0]

    def _constrained(self, rows: list[Row], of: list[Sequence | None], drafts: Any) -> _Flight:
        """Verify the drafts of the program's every row under the masks of what may follow them."""
        build, length = self._device.builder, self._device.sizes.verify_length
        masks = build.no_masks(len(drafts), length)
        for i, sequence in enumerate(of):
            if sequence is not None and sequence.stage is Stage.RUNNING:
                self._masked(sequence, drafts[i].tolist(), masks[i])
        # the pages came with the drafts
        command, _ = build.verify([replace(row, pages=[]) for row in rows], drafts, masks)
        return self._flight(command, of, len(rows) * length, 1)

    def _masked(self, sequence: Sequence, drafts: list[int], masks: Any) -> None:
        assert sequence.constraint is not None
        try:
            sequence.constraint.fill_masks(drafts, masks)
        except Exception as error:  # one request's grammar is not the others' business
            logger.exception("request %s: its constraint failed", sequence.request.request_id)
            self._abort(sequence.request.request_id, "abort", f"the constraint failed: {error}")

    def _land(self, flights: list[_Flight]) -> None:
        """Take the results of a step."""
        for flight in flights:
            rounds: Rounds = self._device.fetch(flight.result)
            now = time.monotonic()
            self._beat = now
            kind = "decode" if flight.rounds else "prefill"
            self._metrics.step(kind, now - flight.begun, flight.tokens, flight.padded)
            for i, sequence in enumerate(flight.of):
                if sequence is not None:
                    sequence.in_flight -= 1
                    sequence.rounds_in_flight -= flight.rounds
                    if sequence.stage is not Stage.FINISHED:
                        self._hand_out(sequence, rounds, i, flight, now)

    def _hand_out(self, sequence: Sequence, rounds: Rounds, row: int, flight: _Flight, now: float) -> None:
        counts, length = rounds.counts[:, row], self._device.sizes.verify_length
        for r in range(len(counts)):
            count = int(counts[r])
            if not count:
                break
            tokens = rounds.tokens[r, row, :count].tolist()
            watcher = sequence.watcher
            kept = watcher.push(tokens) if watcher else count
            tokens = tokens[:kept]
            accepted = int(rounds.accepted[r, row]) if flight.rounds else 0
            drafted = length - 1 if flight.rounds else 0
            first = not sequence.last_token_at
            sequence.tokens.extend(tokens)
            if flight.rounds:
                sequence.rounds, sequence.drafted = sequence.rounds + 1, sequence.drafted + drafted
                sequence.accepted += accepted
                self._metrics.round(drafted, accepted, kept)
            if first:
                self._metrics.first_token(now - sequence.queued_at)
                if sequence.request.trace is not None and not sequence.index:
                    sequence.request.trace.first_token()
            else:
                self._metrics.inter_token((now - sequence.last_token_at) / len(tokens), len(tokens))
            sequence.last_token_at = now
            known = _logprobs(rounds, r, row, kept, sequence.request) if sequence.request.logprobs else ()
            self._emit(sequence, RoundTokens(sequence.index, tokens, drafted, accepted, known))
            if watcher and watcher.matched is not None:
                self._finish(sequence, "stop", watcher.matched)
                return
            if sequence.constraint is not None:
                sequence.constraint.advance(tokens)
            if not rounds.active[r, row]:
                if tokens[-1] in sequence.sampling.stops(self.info.eos_ids):
                    self._finish(sequence, "stop", tokens[-1], exact=True)
                else:
                    self._finish(sequence, "length", exact=True)
                return

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        matched: int | str | None = None,
        message: str = "",
        exact: bool = False,
    ) -> None:
        if sequence.stage is Stage.FINISHED:
            return
        self._scheduler.finish(sequence, exact)
        request_id, now = sequence.request.request_id, time.monotonic()
        usage = sequence.usage()
        queued = (sequence.admitted_at or now) - sequence.queued_at
        self._metrics.finished(reason, usage, queued, now - sequence.queued_at)
        end = Finished(sequence.index, reason, usage, matched, message)
        if sequence.request.trace is not None:
            sequence.request.trace.finished(end)
        self._emit(sequence, end)
        if all(s.stage is Stage.FINISHED for s in self._live[request_id].sequences):
            del self._live[request_id]

    def _emit(self, sequence: Sequence, event: Event) -> None:
        self._outbox[self._live[sequence.request.request_id].stream].append(event)

    def _deliver(self) -> None:
        """Hand the step's events to the event loops in one call each."""
        by_loop: dict[asyncio.AbstractEventLoop, list] = defaultdict(list)
        for stream, events in self._outbox.items():
            by_loop[stream.loop].append((stream, events))
        self._outbox = defaultdict(list)
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the loop is closed: nobody listens
                logger.debug("events of %d requests had no listener", len(batch))


def _put_all(batch: list[tuple[EventStream, list]]) -> None:
    for stream, events in batch:
        stream.put(events)


def _logprobs(rounds: Rounds, r: int, row: int, count: int, request: GenerationRequest) -> list[TokenLogprobs]:
    known, top = rounds.logprobs, request.top_logprobs
    assert known is not None
    picked = known.picked[r, row, :count].tolist()
    ids, values = known.top_ids[r, row, :count, :top].tolist(), known.top[r, row, :count, :top].tolist()
    return [TokenLogprobs(p, list(zip(i, v, strict=True))) for p, i, v in zip(picked, ids, values, strict=True)]
