"""Which weights computed the rows of a trace: runs of rows of one number.

A worker counts the changes of its model's weights, from 0. Runs are int64 ``[num_runs, 2]``, pairs
of a run's first row and its number, ascending; the first one begins at the first row that is here.
A missing row was computed by no weights: it continues the run before it, and those at the beginning
belong to the first run. Without any runs the numbers are unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

MIXED = -1
"""The number of a row that no one version computed: the weights were being updated while its step
ran, or its layers are of several versions."""
MAX_VERSION = 2**31 - 1
"""The largest number: it takes four bytes in the collector and in tables."""

Runs = npt.NDArray[np.int64]


_SPAN_BYTES = 400


class LabelSpan(TypedDict):
    """Output tokens ``[start, end)`` that weights with a label sampled: vLLM's `WeightVersionSpan`.

    They count from 0, without the prompt.
    """

    version: str
    start: int
    end: int


def unknown() -> Runs:
    """Return the runs of a trace of which no number is known."""
    return np.empty((0, 2), np.int64)


def runs_of(numbers: npt.NDArray[np.integer], present: npt.NDArray[np.bool_], start: int) -> Runs:
    """Return the runs of rows.

    Args:
        numbers: The number of each row, ``[num_rows]``; that of a missing row is not looked at.
        present: Which rows are not missing, ``[num_rows]``.
        start: Position of the first row.
    """
    rows = np.flatnonzero(present)
    if not rows.size:
        return unknown()
    known = numbers[rows].astype(np.int64)
    first = np.flatnonzero(np.diff(known, prepend=known[0] - 1))
    runs = np.stack([rows[first] + start, known[first]], axis=1)
    runs[0, 0] = start
    return runs


def by_row(runs: Runs, start: int, num_rows: int) -> Runs:
    """Return the number of each row, ``[num_rows]``; of runs that are not empty, or of no row."""
    return np.repeat(runs[:, 1], np.diff(runs[:, 0], append=start + num_rows))


def cut(runs: Runs, first: int, end: int) -> Runs:
    """Return the runs of the rows from position ``first`` to ``end``, which is left out."""
    if not len(runs) or first >= end:
        return unknown()
    begins = max(0, int(np.searchsorted(runs[:, 0], first, side="right")) - 1)
    part = runs[begins : int(np.searchsorted(runs[:, 0], end))].copy()
    part[:1, 0] = first
    return part


def joined(parts: Sequence[Runs], start: int) -> Runs:
    """Return the runs of pages that follow one another, the first of which begins at ``start``."""
    runs = np.concatenate(parts)
    if len(runs):
        runs = runs[np.flatnonzero(np.diff(runs[:, 1], prepend=runs[0, 1] - 1))]
        runs[0, 0] = start
    return runs


def span(runs: Runs) -> tuple[int, int] | None:
    """Return the oldest and the newest number of runs; None where no run has one version."""
    numbers = runs[runs[:, 1] != MIXED, 1]
    return (int(numbers.min()), int(numbers.max())) if numbers.size else None


def num_stale(runs: Runs, present: npt.NDArray[np.bool_]) -> int:
    """Count the rows of a whole trace that older weights computed than its newest rows, or mixed.

    Args:
        runs: Of the trace.
        present: Which rows are not missing, ``[num_rows]``.
    """
    if not len(runs) or (len(runs) == 1 and runs[0, 1] != MIXED):
        return 0
    numbers = by_row(runs, int(runs[0, 0]), len(present))
    stale = (numbers < runs[:, 1].max()) | (numbers == MIXED)
    return int(np.count_nonzero(stale & present))


def labels_bytes(spans: Sequence[LabelSpan]) -> int:
    """Return what spans of labels take, in CPython's objects."""
    return sum(_SPAN_BYTES + len(span["version"]) for span in spans)


def check_labels(spans: Sequence[LabelSpan], num_tokens: int) -> None:
    """Check the spans of a trace that comes from elsewhere.

    Args:
        spans: Of the trace.
        num_tokens: Output tokens.

    Raises:
        ValueError: They are not in order, or not of these tokens.
    """
    bounds = [bound for span in spans for bound in (span["start"], span["end"])]
    if (
        bounds != sorted(bounds)
        or not 0 <= min(bounds, default=0) <= max(bounds, default=0) <= num_tokens
    ):
        raise ValueError(
            f"weight_labels must be spans of {num_tokens} output tokens, one after the other, got "
            f"bounds {bounds[:8]}"
        )


def check(runs: Runs, start: int, num_rows: int) -> None:
    """Check the runs of a trace that comes from elsewhere.

    Raises:
        ValueError: They are not in order, are not of these rows, or have an impossible number.
    """
    if not len(runs):
        return
    rows, numbers = runs[:, 0], runs[:, 1]
    is_in_order = rows[0] == start and bool((rows[1:] > rows[:-1]).all())
    if not is_in_order or rows[-1] >= start + num_rows:
        raise ValueError(
            f"weights_versions must have rising rows from {start} on, below {start + num_rows}, "
            f"got {rows[:8].tolist()}"
        )
    if numbers.min() < MIXED or numbers.max() > MAX_VERSION:
        raise ValueError(
            f"weights_versions must have numbers from {MIXED} to {MAX_VERSION}, got "
            f"{numbers.min()} to {numbers.max()}"
        )
