"""Draws `rounds.svg`: an answer of the model in the package, round by round, and the parts that a round goes through.

python docs/pictures/rounds.py [FILE]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from mimo_jax import Completion, Generator
from mimo_jax.presets import NANO
from mimo_jax.tokenizer import Tokenizer

QUESTION = "What is the capital of France?"
STOOD, REFUSED, OWN, PLAIN = "#c3e3cb", "#f3d6d6", "#fbdf9d", "#e2e7ee"
INK, FAINT = "#22262b", "#8a9099"
WIDTH = 16.0


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, **style: object) -> None:
    """A rounded box around text."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=color, ec="none")
    axes.add_patch(shape)
    settings = {"ha": "center", "va": "center", "color": INK, "fontsize": 9.5, **style}
    axes.text(x + width / 2, y + height / 2, text, **settings)


def parts(axes: Axes) -> None:
    """What there is, from files to text."""
    axes.text(
        0, 4.55, "Released files in, text out; a round stays on the device", fontsize=12, color=INK, weight="bold"
    )
    box(
        axes,
        0,
        0.9,
        2.9,
        2.7,
        "Hugging Face folder\n\nbackbone: MXFP4 experts,\nFP8 and bf16 layers\n\ndflash/: the drafter",
        PLAIN,
    )
    box(axes, 11.9, 2.45, 4.1, 1.15, "Generator, notebooks", PLAIN)
    box(axes, 11.9, 0.9, 4.1, 1.15, "gRPC server: batching,\nprefix cache, many nodes", PLAIN)
    frame = FancyBboxPatch((3.7, 0.35), 7.4, 3.75, boxstyle="round,pad=0,rounding_size=0.15", fc="none", ec=FAINT, lw=1)
    axes.add_patch(frame)
    axes.text(7.4, 3.72, "one jitted loop on a mesh of devices", fontsize=9.5, color=FAINT, ha="center")
    steps = (
        ("draft", "7 guesses\nin one pass", REFUSED),
        ("verify", "backbone reads\n8 rows at once", PLAIN),
        ("accept", "what it would\nhave written", STOOD),
        ("commit", "keys into pages\nand rings", OWN),
    )
    for i, (name, what, color) in enumerate(steps):
        x = 3.95 + 1.78 * i
        box(axes, x, 1.5, 1.56, 1.75, f"{name}\n\n{what}", color, fontsize=8)
        if i:
            arrow(axes, (x - 0.2, 2.37), (x - 0.01, 2.37))
    arrow(axes, (10.2, 1.4), (4.7, 1.4), bend=-0.12)
    axes.text(7.4, 0.52, "again, until done", fontsize=8.6, color=FAINT, ha="center")
    arrow(axes, (2.98, 2.3), (3.65, 2.3))
    arrow(axes, (11.15, 2.3), (11.83, 3.0))
    arrow(axes, (11.15, 2.3), (11.83, 1.5))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0) -> None:
    """An arrow, bent by a share of its length."""
    style = {"arrowstyle": "->", "color": FAINT, "lw": 1.3, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops=style)


def rounds(axes: Axes, tokenizer: Tokenizer, answer: Completion) -> None:
    """A line a round: drafts that stood, the backbone's own token, drafts that did not."""
    passes = len(answer.rounds)
    written = sum(r.emitted for r in answer.rounds)
    axes.text(
        0,
        passes + 0.5,
        f"“{QUESTION}”: {written} tokens in {passes} passes of the backbone, "
        f"accepted length {answer.stats.accepted_length:.2f}",
        fontsize=12,
        color=INK,
        weight="bold",
    )
    for row, one in enumerate(answer.rounds):
        y = passes - 1 - row
        x = 0.6
        axes.text(0.3, y + 0.36, str(row + 1), fontsize=8.6, color=FAINT, ha="right", va="center")
        shown = [(t, STOOD) for t in one.drafts[: one.accepted][: one.emitted]]
        shown += [(t, OWN) for t in one.tokens[one.accepted : one.emitted]]
        shown += [(t, REFUSED) for t in one.drafts[one.accepted :]]
        for token, color in shown:
            text = tokenizer.decode([token], skip_special=False).replace("\n", "↵")
            width = max(0.42, 0.115 * len(text) + 0.22)
            box(
                axes, x, y, width, 0.72, text.strip() or "␣", color, fontsize=8.6, alpha=0.45 if color == REFUSED else 1
            )
            x += width + 0.1
    legend = (
        (STOOD, "a draft that stood"),
        (OWN, "the backbone's own token"),
        (REFUSED, "a draft refused: never stored"),
    )
    for row, (color, text) in enumerate(legend):
        y = passes - 1 - row
        box(axes, 9.3, y, 0.42, 0.72, "", color)
        axes.text(9.9, y + 0.36, text, fontsize=9.5, color=INK, va="center")


def lengths(axes: Axes) -> None:
    """Accepted length by kind of text, as recorded for the model in the package, beside the release's card."""
    recorded = json.loads((NANO / "results" / "acceptance.json").read_text(encoding="utf-8"))["acceptance"]
    axes.text(9.3, 6.9, "tokens a pass, of 8, by kind of text", fontsize=9.5, color=INK, weight="bold")
    axes.text(9.3, 6.3, "this 14M-parameter model, greedy; below, MiMo-V2.5-Pro by its card", fontsize=7.5, color=FAINT)
    for row, one in enumerate(r for r in recorded if r["temperature"] == 0):
        y = 5.2 - row
        axes.text(10.4, y + 0.3, one["scenario"], fontsize=9, color=INK, ha="right", va="center")
        for length, color, below in ((one["accepted_length"], STOOD, 0.3), (one["release_card"], PLAIN, 0.0)):
            axes.barh(y + below, 0.55 * length, 0.28, 10.6, color=color, align="edge")
            axes.text(10.7 + 0.55 * length, y + below + 0.13, f"{length:.2f}", fontsize=6.5, color=INK, va="center")


def main(path: Path) -> None:
    """Answer the question and draw how."""
    generator = Generator.load(progress=False)
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    answer = generator.chat([{"role": "user", "content": QUESTION}])
    plt.rcParams.update({"svg.hashsalt": path.name, "font.family": "DejaVu Sans"})
    figure, (top, bottom) = plt.subplots(2, height_ratios=(4.9, len(answer.rounds) + 1.2), figsize=(10, 7))
    parts(top)
    rounds(bottom, tokenizer, answer)
    lengths(bottom)
    for axes, height in ((top, 4.9), (bottom, len(answer.rounds) + 1.2)):
        axes.set_xlim(-0.1, WIDTH + 0.1)
        axes.set_ylim(0, height)
        axes.axis("off")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99, hspace=0.05)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
