"""What the collector counts of itself and of the capture."""

from __future__ import annotations

import collections
import dataclasses
import time

import numpy as np
import numpy.typing as npt

from moescope import version_runs
from moescope.trace import RouteTrace, Source
from moescope_service.collector.rows import CAUSES
from moescope_service.messages import Step


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCounts:
    """What a worker that counts has counted since its start; see `capture.counting`."""

    selections: npt.NDArray[np.int64]
    """``[num_phases, num_layers, num_experts]``."""
    rows: npt.NDArray[np.int64]
    """``[num_phases]``."""
    steps: int
    hook_s: float
    """Seconds on the worker's thread."""
    lost: dict[str, int]
    """Rows that are in no count, by cause."""
    time_s: float
    """Unix time, in seconds."""

    def since(self, before: WorkerCounts) -> WorkerCounts:
        """Return what came since earlier counts."""
        return WorkerCounts(
            selections=self.selections - before.selections,
            rows=self.rows - before.rows,
            steps=self.steps - before.steps,
            hook_s=self.hook_s - before.hook_s,
            lost={name: rows - before.lost[name] for name, rows in self.lost.items()},
            time_s=self.time_s,
        )


class Stats:
    """Counters since the collector started; none of them goes back."""

    def __init__(self) -> None:
        self.started_s = time.time()
        """Unix time, in seconds."""
        self.steps = 0
        self.rows_captured = 0
        """Rows that arrived."""
        self.rows_lost: collections.Counter[str] = collections.Counter()
        """Rows that a worker routed and could not ship, by cause."""
        self.hook_s = 0.0
        """Seconds that the capture spent on the workers' threads."""
        self.traces: collections.Counter[str] = collections.Counter()
        """Finished traces, ``complete`` or ``incomplete``, kept or evicted since."""
        self.trace_rows: collections.Counter[str] = collections.Counter()
        """Rows of finished traces, by the name of their `Source`."""
        self.missing: collections.Counter[str] = collections.Counter()
        """Missing rows of finished traces, by `CAUSES`."""
        self.incomplete: collections.Counter[str] = collections.Counter()
        """Incomplete traces by `CAUSES`; one that lacks rows for two causes counts at both."""
        self.stale = 0
        """Rows of finished traces that older weights computed than the trace's newest ones."""
        self.errors = 0
        """Messages, replies and traces that failed here and were left out."""
        self.links_refused = 0
        """Connections of other nodes that were refused: another key, or none."""
        self.registrations_lost = 0
        """Sequences whose API server gave up what it had to tell of them."""
        self.lag_s = 0.0
        """Age of the newest step when it arrived."""

    def add_step(self, step: Step, *, is_first: bool = True) -> None:
        """Count one step, or further rows of one.

        Args:
            step: The step.
            is_first: Whether its worker is the first pipeline stage that routes: the others have
                the same rows, of their own layers; what they lose is counted all the same.
        """
        rows = int(step.spans[:, 2].sum())
        self.steps += is_first and not step.part
        self.hook_s += step.hook_s
        if step.lost is None:
            self.rows_captured += rows * is_first
        else:
            self.rows_lost[step.lost] += rows

    def add_counts(self, new: WorkerCounts, *, is_first: bool = True) -> None:
        """Count what a worker that counts has counted anew; `is_first` as in `add_step`."""
        self.steps += new.steps * is_first
        self.hook_s += new.hook_s
        self.rows_captured += int(new.rows.sum()) * is_first
        self.rows_lost.update(new.lost)

    def add_trace(self, trace: RouteTrace, cause: npt.NDArray[np.uint8]) -> None:
        """Count one finished trace, and why its missing rows are missing."""
        self.traces["complete" if trace.complete else "incomplete"] += 1
        for source, rows in enumerate(np.bincount(trace.source).tolist()):
            self.trace_rows[Source(source).name.lower()] += rows
        self.stale += version_runs.num_stale(trace.weights_versions, trace.present)
        if not trace.complete:
            counts = np.bincount(cause, minlength=256)
            found = {name: int(counts[number]) for name, number in CAUSES.items() if counts[number]}
            self.missing.update(found)
            # Without a missing row it is incomplete since its end was never told by all sides.
            self.incomplete.update(dict.fromkeys(found or ("unknown",), 1))
