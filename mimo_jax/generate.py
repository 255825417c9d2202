"""Offline generation: `Generator` takes text, chat messages or token ids, and gives text as it is decoded.

generator = Generator.load("MiMo-V2.5-Pro-FP4-DFlash")
completion = generator.generate("The capital of France is", max_new_tokens=64)
print(completion.text, completion.stats.accepted_length)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mimo_jax.model import LoadOptions, Model, load_model
from mimo_jax.presets import NANO
from mimo_jax.progress import loading_bar
from mimo_jax.request import SamplingParams
from mimo_jax.session import Decoding, Session, Step
from mimo_jax.stats import DecodeStats
from mimo_jax.tokenizer import StopStrings, StreamDecoder, Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class RoundTrace:
    """One round of one request: the drafts verified, the backbone's tokens, and how many of each counted."""

    drafts: list[int]
    tokens: list[int]
    accepted: int
    emitted: int


@dataclass
class Completion:
    """The answer to one prompt, complete once `finish_reason` is set."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """New tokens, the one that ended the text included."""
    text: str = ""
    """Their text without special tokens and stop strings; empty if the model has no tokenizer."""
    finish_reason: Literal["stop", "length"] | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)
    rounds: list[RoundTrace] = field(default_factory=list)


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one call, compilation apart."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Piece:
    """Text that is new in one row."""

    row: int
    text: str


class Generator:
    """A loaded model that answers prompts, one batch at a time."""

    def __init__(self, model: Model):
        self.model = model
        self.timing = Timing()
        """Of the latest call."""

    @classmethod
    def load(cls, folder: str | Path = NANO, *, progress: bool = True, **options: Any) -> "Generator":
        """Load a checkpoint folder, with a progress bar unless told otherwise.

        Args:
            folder: Default: the small trained model that comes with the package.
            progress: Whether to draw a bar.
            options: As in `LoadOptions`.
        """
        with loading_bar(progress) as report:
            return cls(load_model(Path(folder), LoadOptions(**options), report))

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        decoding: Decoding = Decoding(),
        **settings: Any,
    ) -> Completion:
        """Answer one prompt. Settings are fields of `SamplingParams`, on top of `params`."""
        return self.generate_batch([prompt], _params(params, settings), decoding=decoding)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams] | SamplingParams | None = None,
        *,
        decoding: Decoding = Decoding(),
    ) -> list[Completion]:
        """Answer prompts as one batch, with settings for each or for all."""
        completions = self.completions(prompts)
        for _ in self.stream_batch(completions, params, decoding=decoding):
            pass
        return completions

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        decoding: Decoding = Decoding(),
        **settings: Any,
    ) -> Iterator[str]:
        """Answer one prompt, yielding text as soon as it is certain."""
        completions = self.completions([prompt])
        return (p.text for p in self.stream_batch(completions, _params(params, settings), decoding=decoding))

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        decoding: Decoding = Decoding(),
        **settings: Any,
    ) -> Completion:
        """Answer a conversation rendered with the model's chat template."""
        return self.generate(self.tokenizer.encode_chat(messages), params, decoding=decoding, **settings)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ValueError: The checkpoint has none.
        """
        if self.model.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json: give prompts as token ids")
        return self.model.tokenizer

    def completions(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """Empty completions of prompts, for `stream_batch` to fill."""
        return [Completion(self.tokenizer.encode(p) if isinstance(p, str) else list(p)) for p in prompts]

    def stream_batch(
        self,
        completions: Sequence[Completion],
        params: Sequence[SamplingParams] | SamplingParams | None = None,
        *,
        decoding: Decoding = Decoding(),
    ) -> Iterator[Piece]:
        """Fill empty completions as one batch, yielding each row's text as soon as it is certain.

        Args:
            completions: What `completions(prompts)` gave, one a row.
            params: Settings, one a row or one for all.
            decoding: How to decode them.

        Raises:
            ValueError: Something asked for cannot be done; raised before any memory is taken.
        """
        count = len(completions)
        settings = [params or SamplingParams()] * count if not isinstance(params, Sequence) else list(params)
        if len(settings) != count:
            raise ValueError(f"{count} prompts but {len(settings)} settings: give one a prompt, or one for all")
        readers = [_Reader(c, p, self.model) for c, p in zip(completions, settings, strict=True)]
        session = Session(self.model, [c.prompt_ids for c in completions], settings, decoding)
        timing = Timing(compile=session.compile_seconds)
        step = session.prefill()
        self.timing = timing = replace(timing, prefill=step.seconds)
        yield from _read(readers, step, session)
        while session.active.any():
            step = session.step()
            self.timing = timing = replace(timing, decode=timing.decode + step.seconds)
            yield from _read(readers, step, session)


def _params(params: SamplingParams | None, settings: dict[str, Any]) -> SamplingParams:
    return replace(params or SamplingParams(), **settings)


def _read(readers: "list[_Reader]", step: Step, session: Session) -> Iterator[Piece]:
    active = session.active
    cut = []
    for row, reader in enumerate(readers):
        if reader.completion.finish_reason is not None:
            continue
        text = reader.read(row, step, session.verify_length, finished=not active[row])
        if reader.completion.finish_reason is not None and active[row]:
            cut.append(row)
        if text:
            yield Piece(row, text)
    if cut:
        session.stop(cut)


class _Reader:
    """Turns one row's tokens into its completion."""

    def __init__(self, completion: Completion, params: SamplingParams, model: Model):
        self.completion, self.params = completion, params
        self._eos = params.stops(model.eos_ids)
        self._decoder = StreamDecoder(model.tokenizer) if model.tokenizer else None
        self._stops = StopStrings(params.stop)
        completion.stats.prompt_tokens = len(completion.prompt_ids)
        if params.stop and model.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this checkpoint has no tokenizer.json")

    def read(self, row: int, step: Step, verify_length: int, finished: bool) -> str:
        """Take a step's tokens; gives the text that became certain."""
        completion, stats = self.completion, self.completion.stats
        if step.rounds is None:
            text = self._take(step.tokens[row])
            stats.new_tokens += len(step.tokens[row])
        else:
            text = ""
            log = step.rounds
            for drafts, tokens, n, accepted in zip(
                log.drafts[:, row], log.tokens[:, row], log.counts[:, row], log.accepted[:, row], strict=True
            ):
                if n == 0 or completion.finish_reason is not None:
                    break
                before = len(completion.token_ids)
                text += self._take(tokens[:n].tolist())
                emitted = len(completion.token_ids) - before
                stats.add_round(int(accepted), emitted, verify_length)
                trace = RoundTrace(drafts.tolist(), tokens.tolist(), int(accepted), emitted)
                completion.rounds.append(trace)
        if finished and completion.finish_reason is None:
            completion.finish_reason = "stop" if completion.token_ids[-1] in self._eos else "length"
            text += self._finish()
        completion.text += text
        return text

    def _take(self, ids: list[int]) -> str:
        text = ""
        for token in ids:
            self.completion.token_ids.append(token)
            if self._decoder is None:
                continue
            text += self._stops.push(self._decoder.push(token))
            if self._stops.stopped:
                self.completion.finish_reason = "stop"
                return text
        return text

    def _finish(self) -> str:
        if self._decoder is None:
            return ""
        rest = self._stops.push(self._decoder.flush())
        if self._stops.stopped:
            self.completion.finish_reason = "stop"
            return rest
        return rest + self._stops.flush()
