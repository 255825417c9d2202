"""Results as pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mimo_jax.evaluation.acceptance import RELEASE_CARD, Acceptance
from mimo_jax.evaluation.quality import Comparison
from mimo_jax.evaluation.signals import DEVICES, SignalsResult
from mimo_jax.progress import drawing
from mimo_jax.training.ablation_results import Effect


def acceptance(results: Sequence[Acceptance], path: Path) -> None:
    """Accepted length by scenario, beside the release card's, and the share of drafts that stood by position."""
    names = list(dict.fromkeys(r.scenario for r in results))
    temperatures = list(dict.fromkeys(r.temperature for r in results))
    with drawing(path, columns=2) as (left, right):
        width = 0.8 / (len(temperatures) + 1)
        for i, temperature in enumerate(temperatures):
            lengths = [r.accepted_length for r in results if r.temperature == temperature]
            label = "greedy" if temperature == 0 else f"temperature {temperature:g}"
            left.bar(np.arange(len(names)) + i * width, lengths, width, label=label)
        card = [RELEASE_CARD.get(name, np.nan) for name in names]
        at = np.arange(len(names)) + len(temperatures) * width
        left.bar(at, card, width, color="none", edgecolor="gray", hatch="//", label="MiMo-V2.5-Pro, its card")
        left.set_xticks(np.arange(len(names)) + 0.4 - width / 2, names)
        left.set_ylabel("tokens a round")
        left.legend()
        for r in results:
            if r.temperature == 0:
                right.plot(range(1, len(r.per_position) + 1), r.per_position, marker="o", label=r.scenario)
        right.set_xlabel("position in the block")
        right.set_ylabel("share of rounds in which the draft stood, greedy")
        right.set_ylim(0, 1)
        right.legend()


def quality(results: Sequence[Comparison], path: Path) -> None:
    """Changes against the reference with their intervals."""
    with drawing(path) as (axis,):
        rows = np.arange(len(results))[::-1]
        change = np.array([r.change for r in results])
        spread = np.array([(r.change - r.low, r.high - r.change) for r in results]).T
        axis.errorbar(100 * change, rows, xerr=100 * np.maximum(spread, 0), fmt="o", capsize=3)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_yticks(rows, [r.name for r in results])
        axis.set_xlabel("change in percent, 95 % interval")


def ablation(results: Sequence[Effect], path: Path) -> None:
    """Changes of accepted length against the base, arm by arm, for every set of prompts beside the others."""
    sets = list(dict.fromkeys(r.prompts for r in results))
    with drawing(path, columns=len(sets)) as axes:
        for axis, name in zip(axes, sets, strict=True):
            shown = [r for r in results if r.prompts == name and r.change]
            for row, r in enumerate(reversed(shown)):
                axis.plot([r.change], [row], "o", color="C0")
                if r.low is not None:
                    axis.plot([r.low, r.high], [row, row], color="C0")
            axis.axvline(0, color="gray", linewidth=0.8)
            axis.set_yticks(range(len(shown)), [f"{r.arm} ({r.verify_length} verified)" for r in reversed(shown)])
            base = next((r.accepted_length for r in results if r.prompts == name), float("nan"))
            axis.set_title(f"{name} prompts; base {base:.2f}")
            axis.set_xlabel("change of tokens a round, 95 % interval")


def signals(results: Sequence[SignalsResult], path: Path) -> None:
    """Anchors a second, and bytes that devices send beside the gradients, by number of devices."""
    with drawing(path, columns=2) as (left, right):
        for scaling, edges in dict.fromkeys((r.scaling, r.edges) for r in results):
            of = [r for r in results if (r.scaling, r.edges) == (scaling, edges)]
            devices, label = [r.devices for r in of], f"{scaling} scaling, edges: {edges}"
            left.plot(devices, [r.anchors_per_second for r in of], marker="o", label=label)
            right.plot(devices, [r.sums_bytes + r.context_bytes for r in of], marker="o", label=label)
        for axis, name in (
            (left, "anchors a second, on the same cores"),
            (right, "bytes of sums and context"),
        ):
            axis.set_xscale("log", base=2)
            axis.set_xticks(DEVICES, map(str, DEVICES))
            axis.set_xlabel("devices")
            axis.set_ylabel(name)
            axis.set_ylim(bottom=0)
            axis.legend(fontsize="small")
