"""Results as tables, and how figures with a spread are written."""

from collections.abc import Sequence

from rich.table import Table

from mimo_jax.evaluation.acceptance import RELEASE_CARD, Acceptance
from mimo_jax.evaluation.bench import ContextResult, DecodeResult, Spread
from mimo_jax.evaluation.compiling import CompileResult
from mimo_jax.evaluation.loading import LoadResult
from mimo_jax.evaluation.quality import Comparison
from mimo_jax.evaluation.shard import ShardResult
from mimo_jax.evaluation.signals import SignalsResult
from mimo_jax.evaluation.speed import Speedup
from mimo_jax.model import Model
from mimo_jax.training.ablation_results import Effect


def spread(spread: Spread | None, digits: int = 1) -> str:
    """Median, and extremes in brackets."""
    return "-" if spread is None else f"{spread.median:.{digits}f} ({spread.low:.{digits}f}-{spread.high:.{digits}f})"


def decode(results: Sequence[DecodeResult]) -> Table:
    """Of `bench decode`: speeds."""
    table = Table(title="Decode, greedy, random prompts: median (lowest-highest)", title_justify="left")
    names = ("verify length", "prefill tok/s", "decode tok/s", "accepted length", "compile s", "dispatch us")
    for name in names:
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            str(r.verify_length),
            spread(r.prefill_tokens_per_second),
            spread(r.decode_tokens_per_second),
            f"{r.accepted_length:.2f}",
            f"{r.compile_seconds:.1f}",
            spread(r.dispatch_microseconds, 0),
        )
    return table


def context(results: Sequence[ContextResult], model: Model) -> Table:
    """Of `bench decode`: a round by context."""
    table = Table(title="One round by context, caches filled at random: milliseconds", title_justify="left")
    block = model.drafter_config.block_size if model.drafter_config else 1
    for name in ("context", "draft", f"verify {block} + commit", "plain step"):
        table.add_column(name, justify="right")
    for r in results:
        cells = (r.draft_milliseconds, r.verify_milliseconds, r.plain_milliseconds)
        table.add_row(f"{r.context:,}", *(spread(c, 2) for c in cells))
    return table


def shard(results: Sequence[ShardResult]) -> Table:
    """Of `bench shard`."""
    table = Table(title="One device's share of a round: milliseconds", title_justify="left")
    for name in ("batch", "context", "draft", "verify + commit", "round", "floor", "round / floor", "plain step"):
        table.add_column(name, justify="right")
    for r in results:
        at = f"{r.batch}", f"{r.context:,}"
        least = "-" if r.floor_milliseconds is None else f"{r.floor_milliseconds:.2f}"
        if r.measured is None or r.milliseconds is None:
            table.add_row(*at, "no room", "", "", least)
            continue
        ratio = "-" if r.floor_milliseconds is None else f"{r.milliseconds / r.floor_milliseconds:.2f}"
        parts = [spread(s, 2) for s in (r.measured.draft_milliseconds, r.measured.verify_milliseconds)]
        table.add_row(*at, *parts, f"{r.milliseconds:.2f}", least, ratio, spread(r.measured.plain_milliseconds, 2))
    return table


def loading(results: Sequence[LoadResult]) -> Table:
    """Of `bench load`."""
    table = Table(title="Weights into memory, files in the page cache: median (lowest-highest)", title_justify="left")
    table.add_column("")
    for name in ("MB read", "seconds", "GB/s", "MB on devices", "most MB of host memory"):
        table.add_column(name, justify="right")
    for r in results:
        sizes = ("-" if size is None else f"{size / 1e6:,.0f}" for size in (r.owned_bytes, r.host_bytes))
        table.add_row(r.what, f"{r.nbytes / 1e6:,.0f}", spread(r.seconds, 2), f"{r.gigabytes_per_second:.2f}", *sizes)
    return table


def compiling(results: Sequence[CompileResult]) -> Table:
    """Of `bench compile`."""
    table = Table(title="A round's program from shapes, seconds: median (lowest-highest)", title_justify="left")
    table.add_column("compilation cache")
    for name in ("trace and lower", "compile or read", "both, CPU", "whole process", "found in cache"):
        table.add_column(name, justify="right")
    for r in results:
        times = (spread(s) for s in (r.lower_seconds, r.compile_seconds, r.cpu_seconds, r.process_seconds))
        table.add_row(r.what, *times, f"{r.cache_hits} of {r.cache_hits + r.cache_misses}")
    return table


def signals(results: Sequence[SignalsResult]) -> Table:
    """Of `bench signals`."""
    title = "Drafter blocks on sequences cut over devices: loss and gradients, median (lowest-highest)"
    table = Table(title=title, title_justify="left")
    for name in ("scaling", "edges"):
        table.add_column(name)
    for name in ("devices", "positions", "anchors", "ms", "anchors/s", "sums B", "context B", "gradients B"):
        table.add_column(name, justify="right")
    for r in results:
        sent = (f"{size:,}" for size in (r.sums_bytes, r.context_bytes, r.gradient_bytes))
        sizes = f"{r.devices}", f"{r.length:,}", f"{r.anchors:,}"
        table.add_row(r.scaling, r.edges, *sizes, spread(r.milliseconds, 0), f"{r.anchors_per_second:,.0f}", *sent)
    return table


def speed(results: Sequence[Speedup]) -> Table:
    """Of `bench scenarios`."""
    table = Table(title="Speculative against plain decode: median (lowest-highest)", title_justify="left")
    table.add_column("scenario")
    for name in ("plain tok/s", "speculative tok/s", "factor", "accepted length", "time drafting"):
        table.add_column(name, justify="right")
    for r in results:
        speeds = spread(r.plain_tokens_per_second), spread(r.speculative_tokens_per_second), spread(r.factor, 2)
        table.add_row(r.scenario, *speeds, f"{r.accepted_length:.2f}", f"{r.drafting_share:.0%}")
    return table


def acceptance(results: Sequence[Acceptance]) -> Table:
    """Of `eval acceptance`."""
    table = Table(title="Tokens a round, and how predictable the answers were", title_justify="left")
    table.add_column("scenario")
    names = ("temperature", "accepted length", "the card's", "drafts that stood, by position", "perplexity", "entropy")
    for name in names:
        table.add_column(name, justify="right")
    for r in results:
        stood = " ".join(f"{share:.0%}" for share in r.per_position)
        card = f"{RELEASE_CARD[r.scenario]:.2f}" if r.scenario in RELEASE_CARD and r.temperature == 0 else ""
        figures = (f"{r.temperature:g}", f"{r.accepted_length:.2f}", card, stood)
        table.add_row(r.scenario, *figures, f"{r.perplexity:.2f}", f"{r.entropy:.2f}")
    return table


def quality(results: Sequence[Comparison]) -> Table:
    """Of `eval quality`."""
    table = Table(title="Change against the reference, 95 % intervals", title_justify="left")
    table.add_column("measure")
    for name in ("reference", "model", "change", "interval", "n"):
        table.add_column(name, justify="right")
    for r in results:
        interval = f"{r.low:+.1%} to {r.high:+.1%}"
        table.add_row(r.name, f"{r.first:.3f}", f"{r.second:.3f}", f"{r.change:+.1%}", interval, str(r.count))
    return table


def ablation(results: Sequence[Effect]) -> Table:
    """Of `train ablate`."""
    table = Table(title="Accepted length, and its change against the base, 95 % intervals", title_justify="left")
    table.add_column("arm")
    table.add_column("prompts")
    for name in ("verified", "accepted length", "by seed", "change", "interval"):
        table.add_column(name, justify="right")
    for r in results:
        interval = "" if r.low is None or r.high is None else f"{r.low:+.2f} to {r.high:+.2f}"
        by_seed = " ".join(f"{length:.2f}" for length in r.by_seed)
        figures = str(r.verify_length), f"{r.accepted_length:.2f}", by_seed, f"{r.change:+.2f}", interval
        table.add_row(r.arm, r.prompts, *figures)
    return table
