"""Progress bars of the commands."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def bar(console: Console, label: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar; call what it gives after each item.

    Args:
        console: Where to show it.
        label: What is in progress.
        total: How many items there are.
    """
    with bars(console, {label: total}) as advances:
        yield advances[label]


@contextlib.contextmanager
def bars(console: Console, totals: Mapping[str, int]) -> Iterator[dict[str, Callable[[], None]]]:
    """Show progress bars at the same time; call what each label has after each item.

    Args:
        console: Where to show them.
        totals: How many items there are, by the label that says what is in progress.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {label: progress.add_task(label, total=total) for label, total in totals.items()}
        yield {label: functools.partial(progress.advance, task) for label, task in tasks.items()}
