"""Progress bars of the commands."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

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


@contextlib.contextmanager
def parts(console: Console, labels: Sequence[str]) -> Iterator[list[Callable[[float], None]]]:
    """Show progress bars of 100 parts; tell what each label has which part is done, 0 to 1.

    Args:
        console: Where to show them.
        labels: What is in progress.
    """
    with bars(console, dict.fromkeys(labels, 100)) as advances:
        yield [_Part(advances[label]) for label in labels]


class _Part:
    """Advances a bar of 100 parts up to where the work is."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance, self._shown = advance, 0

    def __call__(self, done: float) -> None:
        while self._shown < int(100 * done):
            self._advance()
            self._shown += 1
