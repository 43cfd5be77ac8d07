"""The collector without its socket: messages in, replies out.

Runs in one thread. ``state.outbox`` holds what is to be sent; the process around it sends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import orjson

from moescope import version_runs
from moescope_service.collector.answers import Answers
from moescope_service.collector.archive_queue import ArchiveQueue
from moescope_service.collector.counters import ExpertCounters
from moescope_service.collector.log_file import LogFile
from moescope_service.collector.reassembly import Reassembler
from moescope_service.collector.routes_log import RoutesLog
from moescope_service.collector.rows import Rows
from moescope_service.collector.sequences import Sequence
from moescope_service.collector.state import CollectorState
from moescope_service.collector.stats import WorkerCounts
from moescope_service.collector.steps import Steps
from moescope_service.collector.store import Kept
from moescope_service.collector.windows import CountWindows
from moescope_service.collector.workers import Peer
from moescope_service.histogram import PHASES
from moescope_service.limited_logger import LimitedLogger
from moescope_service.messages import (
    CaptureSpec,
    Frames,
    Register,
    Step,
    WorkerState,
    pack,
    unpack,
    unpack_introduction,
    unpack_steps,
)
from moescope_service.processes import Process
from moescope_service.queries import unpack_query
from moescope_service.settings import Settings

logger = logging.getLogger("moescope.collector")


class Collector:
    """Reassembles, keeps, counts and logs the routes of one deployment.

    A connection begins with an introduction: ``worker`` or ``server`` (an API server). A peer that
    was connected to a collector before this one says there what this one has to know. What peers
    tell that have not introduced themselves is left out; their queries are answered.

    Args:
        settings: What is kept, and how much.
        clock: Monotonic seconds.
        epoch: How many collectors the deployment had before this one.
        archive: The way to the archive, where there is one.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        *,
        epoch: int = 0,
        archive: ArchiveQueue | None = None,
    ) -> None:
        self.state = CollectorState(settings, clock, epoch=epoch)
        if settings.log is not None:
            file = LogFile(settings.log, settings.log_max_bytes)
            self.state.log = RoutesLog(file, settings.log_layers)
        self.state.archive = archive
        self._limited_logger = LimitedLogger(logger)
        self._answers = Answers(self.state)
        self._counted: dict[tuple[int, int], WorkerCounts] = {}  # by engine and stage

    def handle(self, peer: Peer, frames: Frames) -> None:
        """Take one message in.

        Raises:
            ValueError: The kind of message is unknown.
        """
        kind, values = unpack(frames)
        match kind:
            case "steps":
                self._on_steps(peer, values, frames)
            case "counts":
                self._on_counts(peer, values, frames)
            case "query":
                self._answers.ask(peer, *unpack_query(values))
            case "cancel":
                self._answers.cancel(peer, values["number"])
            case "worker":
                self._on_worker(peer, *unpack_introduction(values))
            case "server":
                self._on_server(peer, **values)
            case "register" | "finish" | "alias":
                self.state.receipts.count(peer)
                if peer in self.state.servers:
                    self._on_sequence(kind, values, frames)
            case "lost":
                self.state.stats.registrations_lost += values["count"]
                self.state.store.note_lost(dict(values["lost"]))
            case _:
                raise ValueError(f"unknown kind of message: {kind!r}")

    def _on_server(self, peer: Peer, name: str = "") -> None:
        if name and (before := self.state.receipts.begin(peer, name)) is not None:
            self.state.servers.discard(before)
        self.state.servers.add(peer)

    def _on_sequence(self, kind: str, values: dict[str, Any], frames: Frames) -> None:
        match kind:
            case "register" if values["internal_id"] not in self.state.store:
                register = msgspec.convert(values, Register)
                prompt_ids = np.frombuffer(frames[1], np.int32) if len(frames) > 1 else None
                self._settle(self.state.sequences.register(register, prompt_ids))
            case "finish":
                output_ids = np.frombuffer(frames[1], np.int32)
                self._settle(self.state.sequences.finish(**values, output_ids=output_ids))
            case "alias":
                self._on_alias(**values)

    def tick(self) -> None:
        """Do what time demands; called at least every 50 ms."""
        for internal_id, rows in self.state.workers.overdue():
            self._settle(self.state.sequences.end_unless_told(internal_id, rows))
        for sequence in self.state.sequences.overdue():
            self._settle(sequence, timed_out=True)
        self._answers.expire()
        self.state.outbox += self.state.receipts.take()
        self._limited_logger.tick()
        if self.state.windows is not None:
            self.state.windows.tick()

    def work(self) -> bool:
        """Go on with what is done piece by piece; return whether there is more of it."""
        return self._answers.work()

    def reopen_log(self) -> None:
        """Look at once whether the log was moved."""
        if self.state.log is not None:
            self.state.log.wake()

    def close(self) -> None:
        """Write out the log, and hand over what the archive lacks."""
        if self.state.log is not None:
            self.state.log.close()
        if self.state.archive is not None:
            self.state.archive.close()

    def _on_worker(
        self,
        peer: Peer,
        spec: CaptureSpec,
        is_capturing: bool,
        worker_state: WorkerState | None,
        process_text: str,
    ) -> None:
        if not self.state.workers.fits(spec):
            logger.error("a worker with another model introduced itself; its routes are left out")
            return
        process = Process.parse(process_text)
        if (rival := self.state.workers.rival(spec, process)) is not None:
            logger.error(
                "a second worker of engine %d, stage %d introduced itself (process %s): its routes "
                "are left out while the first one runs (process %d)",
                spec.engine, spec.stage, process.pid if process else "unknown", rival.pid,
            )  # fmt: skip
            return
        worker = self.state.workers.add(peer, spec, worker_state, process)
        if self.state.spec is None and (spec_of_all := self.state.workers.spec) is not None:
            self._begin(spec_of_all)
        self.state.take_over_capturing(is_capturing)
        if worker_state is not None:
            nothing_of_it = Rows.nothing(spec, worker.cause_before)
            for internal_id in worker_state.ended:
                nothing = self.state.workers.end(worker, internal_id, nothing_of_it)
                if nothing is not None:
                    self._settle(self.state.sequences.end_unless_told(internal_id, nothing))
        self.state.outbox.append((peer, pack("capture", on=self.state.is_capturing)))

    def _begin(self, spec: CaptureSpec) -> None:
        self.state.spec = spec
        self.state.counters = ExpertCounters(spec.layers, spec.num_experts)
        self.state.steps = Steps(spec)
        self.state.windows = CountWindows(self.state.counters, self.state.clock)
        if self.state.settings.metrics_window_s > self.state.windows.kept_s:
            logger.warning(
                "the load balance metrics look back %g s instead of %g: no more is kept of a "
                "model of %d layers of %d experts",
                self.state.windows.kept_s, self.state.settings.metrics_window_s,
                len(spec.layers), spec.num_experts,
            )  # fmt: skip
        self.state.refusal = self.state.settings.log_refusal(spec.layers)
        if self.state.log is not None and self.state.refusal is None:
            self.state.log.begin(spec)

    def _on_steps(self, peer: Peer, values: dict[str, Any], frames: Frames) -> None:
        worker = self.state.workers.get(peer)
        if worker is not None:
            for step in unpack_steps(values, frames, worker.spec):
                self.state.stats.lag_s = self.state.workers.age_s(peer, step.time_s)
                self._apply(worker, step)

    def _apply(self, worker: Reassembler, step: Step) -> None:
        is_first = self.state.workers.is_first(worker)
        self.state.stats.add_step(step, is_first=is_first)
        ended, written = worker.apply(step)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("step %d %s", step.number, orjson.dumps(worker.describe(step)).decode())
        if written is not None and self.state.counters and self.state.steps:
            new = self.state.counters.add(written, worker.spec.layers, with_rows=is_first)
            self.state.steps.add(worker.spec, step, new, is_first=is_first)
        for internal_id, part in ended:
            rows = self.state.workers.end(worker, internal_id, part)
            if rows is not None:
                self._settle(self.state.sequences.end(internal_id, rows))

    def _on_counts(self, peer: Peer, values: dict[str, Any], frames: Frames) -> None:
        worker = self.state.workers.get(peer)
        if worker is None:
            return
        spec = worker.spec
        shape = (len(PHASES), len(spec.layers), spec.num_experts)
        totals = np.frombuffer(frames[1], np.int64).reshape(shape)
        counts = WorkerCounts(selections=totals, rows=totals[:, 0].sum(-1) // spec.top_k, **values)
        self.state.stats.lag_s = self.state.workers.age_s(peer, counts.time_s)
        place = spec.engine, spec.stage  # it may come again, on another connection
        # Its first message says where it stood: that was before this collector.
        before = self._counted.setdefault(place, counts)
        if self.state.counters is None or counts.steps == before.steps:
            return
        self._counted[place] = counts
        new, is_first = counts.since(before), self.state.workers.is_first(worker)
        self.state.stats.add_counts(new, is_first=is_first)
        self.state.counters.add_counted(new.selections, new.rows * is_first, spec.layers)

    def _on_alias(self, internal_ids: list[str], alias: str) -> None:
        for internal_id in internal_ids:
            for sequence in list(self.state.sequences.ids.any(internal_id).values()):
                self.state.sequences.add_id(sequence, alias)
            self.state.store.add_id(alias, to=internal_id)
            if self.state.archive is not None:
                self.state.archive.add_id(alias, [*self.state.store.ids.any(internal_id)])

    def _settle(self, sequence: Sequence | None, *, timed_out: bool = False) -> None:
        """Make the trace of a sequence of which worker and API server have told the end."""
        if sequence is None or not (sequence.is_ready or timed_out):
            return
        ids, keep = tuple(sequence.ids), sequence.keep
        self.state.sequences.close(sequence)
        try:
            if keep and self.state.spec is not None:
                trace, cause = sequence.trace(
                    self.state.spec,
                    timed_out=timed_out,
                    with_token_ids=self.state.settings.keeps_token_ids,
                )
                self.state.stats.add_trace(trace, cause)
                if self.state.log is not None and self.state.refusal is None:
                    self.state.log.write(trace)
                versions = version_runs.span(trace.weights_versions)
                kept = Kept(sequence.uid, trace, ids, sequence.owner, trace.coverage, versions)
                self.state.store.add(kept)
                if self.state.archive is not None:
                    self.state.archive.add(kept, self.state.spec)
        except Exception:  # the others of this step, or of this tick, are not to suffer
            self.state.stats.errors += 1
            self._limited_logger.exception("left out a trace that cannot be made, of %s", ids)
        self._answers.retry(ids)
