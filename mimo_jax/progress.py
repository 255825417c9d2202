"""Progress bars for work that takes long enough to wonder about."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Report = Callable[[str, int, int], None]
"""Called with (component, bytes so far, bytes in all)."""


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
