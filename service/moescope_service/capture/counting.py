"""Counts-only mode: selections of experts leave the worker, routes do not.

Each step is added to a histogram where its routing is: in host memory on the CPU, in the GPU's
memory by one kernel. Once a second a thread sends the totals so far, not what was added since: the
next message makes up for one that is lost. Every connection begins with the newest totals: a
collector that was started again subtracts them, and so counts only what is added afterwards.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moescope_service.addresses import Address
from moescope_service.capture.rows import Batch
from moescope_service.histogram import PHASES
from moescope_service.link import Link
from moescope_service.messages import CaptureSpec, Frames, pack, pack_introduction, unpack
from moescope_service.processes import Process

REPORT_S = 1.0
"""Seconds between two messages with totals; none is sent where no step ran in between."""
_MAX_BYTES = 16 * 2**20


class Totals(NamedTuple):
    """What a sink has counted."""

    selections: npt.NDArray[np.int64]
    """``[num_phases, num_layers, num_experts]``."""
    rows_missed: int
    """Rows that a layer did not hand over; they are not in ``selections``."""


class CountSink(Protocol):
    """Adds up the routing of steps; hooks the routers as a `StepSink` does."""

    def hook(self, column: int, router: Any) -> None:
        """Let one router hand over its results."""

    def start_step(self) -> None:
        """Forget earlier rows."""

    def count(self, first_row: npt.NDArray[np.int32], is_decode: npt.NDArray[np.bool_]) -> None:
        """Add the step that just ran; called on the worker's thread.

        Args:
            first_row: Each sequence's first row, and the number of rows, ``[num_reqs + 1]``.
            is_decode: Whether each sequence's tokens were generated, ``[num_reqs]``.
        """

    def skip(self, num_rows: int) -> None:
        """Leave out the step that just ran."""

    def totals(self) -> Totals:
        """Return what was counted so far; called in the reporting thread."""


class CountRecorder:
    """Counts each step, and reports; takes the place of a `Recorder`.

    Args:
        address: Where the collector is bound.
        spec: What this worker captures.
        sink: Counts.
        read_batch: Returns, right after a step, which sequence has which rows; None: no model ran.
        report_s: How often to report, in seconds.
        cores: Where the link's thread may run; see `Link`.
    """

    def __init__(
        self,
        address: Address | str,
        spec: CaptureSpec,
        *,
        sink: CountSink,
        read_batch: Callable[[], Batch | None],
        report_s: float = REPORT_S,
        cores: Collection[int] | None = None,
    ) -> None:
        self._spec = spec
        self._sink = sink
        self._read_batch = read_batch
        self._report_s = report_s
        self._is_capturing = True
        self._process = str(Process.current())
        self._prompt_len: dict[str, int] = {}
        self._last_ids: list[str] = []
        self._last_prompt_len = np.empty(0, np.int32)
        self._steps = self._reported_steps = self._rows_paused = 0
        self._hook_s = 0.0
        shape = (len(PHASES), len(spec.layers), spec.num_experts)
        self._newest = self._made_report(Totals(np.zeros(shape, np.int64), 0)).frames
        self._link = Link(
            address,
            self._on_message,
            max_bytes=_MAX_BYTES,
            name="moescope-recorder",
            encode=self._encode,
            introduce=self._introduce,
            cores=cores,
        )
        self._is_closing = threading.Event()
        self._reporter = threading.Thread(
            target=self._report_often, name="moescope-counts", daemon=True
        )
        self._reporter.start()

    def start_step(self, scheduler_output: Any) -> None:
        """Prepare for a step; called on the worker's thread before the model runs."""
        started_s = time.perf_counter()
        self._sink.start_step()
        for internal_id in scheduler_output.finished_req_ids:
            self._prompt_len.pop(internal_id, None)
        self._hook_s += time.perf_counter() - started_s

    def record_step(self, scheduler_output: Any) -> None:
        """Count the step that just ran; called on the worker's thread."""
        started_s = time.perf_counter()
        for new in scheduler_output.scheduled_new_reqs:
            self._prompt_len[new.req_id] = new.prompt_len
        batch = self._read_batch() if scheduler_output.total_num_scheduled_tokens else None
        if batch is not None:
            if self._is_capturing:
                self._sink.count(batch.first_row, self._is_decode(batch))
            else:
                num_rows = int(batch.first_row[-1])
                self._sink.skip(num_rows)
                self._rows_paused += num_rows
            self._steps += 1
        self._hook_s += time.perf_counter() - started_s

    def close(self) -> None:
        """Report what was counted since, and stop."""
        self._is_closing.set()
        self._reporter.join(1.0)
        self._link.close()

    def _is_decode(self, batch: Batch) -> npt.NDArray[np.bool_]:
        if batch.internal_ids != self._last_ids:  # most steps have the sequences of the one before
            self._last_ids = list(batch.internal_ids)
            lengths = [self._prompt_len.get(internal_id, 0) for internal_id in self._last_ids]
            self._last_prompt_len = np.array(lengths, np.int32)
        return batch.scheduled_position >= self._last_prompt_len

    def _report_often(self) -> None:
        while not self._is_closing.wait(self._report_s):
            self._report()
        self._report()

    def _report(self) -> None:
        if self._steps != self._reported_steps:
            self._reported_steps = self._steps
            self._link.put(self._made_report(self._sink.totals()))

    def _made_report(self, totals: Totals) -> _Report:
        lost = {"hook_missed": totals.rows_missed, "paused": self._rows_paused}
        values = {"steps": self._reported_steps, "hook_s": self._hook_s, "lost": lost}
        return _Report(pack("counts", [totals.selections], time_s=time.time(), **values))

    def _encode(self, reports: list[_Report]) -> list[Frames]:
        self._newest = reports[-1].frames  # sent or not: every connection begins with it
        return [report.frames for report in reports]

    def _introduce(self) -> list[Frames]:
        introduction = pack_introduction(
            self._spec, is_capturing=self._is_capturing, process=self._process
        )
        return [introduction, self._newest]

    def _on_message(self, frames: Frames) -> None:
        kind, values = unpack(frames)
        if kind == "capture":
            self._is_capturing = bool(values["on"])


class _Report(NamedTuple):
    frames: Frames

    @property
    def size_bytes(self) -> int:
        return sum(memoryview(frame).nbytes for frame in self.frames)


def phase_runs(
    first_row: npt.NDArray[np.int32], is_decode: npt.NDArray[np.bool_]
) -> list[tuple[int, int, bool]]:
    """Return (first row, rows, whether they are generated) of each stretch of a step's rows."""
    edges = np.flatnonzero(is_decode[1:] != is_decode[:-1]) + 1
    bounds = [0, *edges.tolist(), len(is_decode)]
    return [
        (int(first_row[start]), int(first_row[end] - first_row[start]), bool(is_decode[start]))
        for start, end in itertools.pairwise(bounds)
    ]
