"""What people watch: progress bars for work that takes long enough to wonder about, tables and pictures."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Report = Callable[[str, int, int], None]
"""Called with (component, bytes so far, bytes in all)."""


def reporter(progress: Report | None, component: str, total: int) -> Callable[[int], None]:
    """Tells `progress`, if there is one, of the sum of the bytes that it is called with."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(component, done, total)

    return report


@contextmanager
def loading_bar(shown: bool = True) -> Iterator[Report]:
    """A bar a component on stderr, with GB/s and the time left; silent unless `shown` and stderr is a terminal.

    In a notebook rich draws the bar in the cell.
    """
    console = Console(stderr=True)
    if not shown or not (console.is_terminal or console.is_jupyter or "ipykernel" in sys.modules):
        yield lambda component, done, total: None
        return
    figures = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *figures, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(component: str, done: int, total: int) -> None:
            if component not in tasks:
                tasks[component] = bars.add_task(component, total=total)
            bars.update(tasks[component], completed=done)

        yield report


@contextmanager
def counting_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that moves by what it is told was done; it vanishes at the end."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as bars:
        task = bars.add_task(title, total=total)
        yield lambda count: bars.advance(task, count)


def require_matplotlib() -> Any:
    """Matplotlib's `Figure`, which draws without a display; raises `ValueError` where the library is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'mimo-jax[train]'") from None
    return Figure


@contextmanager
def drawing(path: Path, rows: int = 1, columns: int = 1) -> Iterator[list[Any]]:
    """Axes of a picture, row by row, that is written to `path` in the end, without a display."""
    figure = require_matplotlib()(figsize=(6.4 * columns, 4.2 if rows == 1 else 2.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.grid(alpha=0.3)
    yield axes
    figure.savefig(path, dpi=120)


def output_console() -> Console:
    """Where results go: standard output, with tables wide enough to read where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)
