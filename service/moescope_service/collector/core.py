"""The collector without its socket: messages in, replies out.

Runs in one thread. `Collector.outbox` holds what is to be sent; the process around it sends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import orjson

from moescope_service.collector.counters import ExpertCounters
from moescope_service.collector.queries import Queries
from moescope_service.collector.reassembly import CAUSES, Reassembler, Rows
from moescope_service.collector.routes_log import RoutesLog
from moescope_service.collector.sequences import Sequence, Sequences
from moescope_service.collector.stats import Report, Stats
from moescope_service.collector.store import Kept, TraceStore
from moescope_service.collector.windows import CountWindows
from moescope_service.collector.workers import Peer, Workers
from moescope_service.histogram import PHASES
from moescope_service.messages import (
    Frames,
    Hello,
    Register,
    Snapshot,
    Step,
    pack,
    unpack,
    unpack_hello,
    unpack_steps,
)
from moescope_service.settings import Settings

logger = logging.getLogger("moescope.collector")


class Collector:
    """Reassembles, keeps, counts and logs the routes of one deployment.

    A connection begins with an introduction: ``hello`` of a worker, ``server`` of an API server.
    Whoever was connected to a collector before this one says there what this one has to know. What
    peers tell that have not introduced themselves is left out; their questions are answered.

    Args:
        settings: What is kept, and how much.
        clock: Monotonic seconds.
        epoch: How many collectors the deployment had before this one.
    """

    def __init__(
        self, settings: Settings, clock: Callable[[], float] = time.monotonic, *, epoch: int = 0
    ) -> None:
        self.settings = settings
        self.epoch = epoch
        self.hello: Hello | None = None
        """What the workers capture; None before all of an engine have said hello."""
        self.refusal: str | None = None
        """Why the deployment is not to serve, which only its workers together can tell."""
        self.counters: ExpertCounters | None = None
        self.windows: CountWindows | None = None
        self.sequences = Sequences(clock)
        self.store = TraceStore(settings.memory)
        self.stats = Stats()
        self.outbox: list[tuple[Peer, Frames]] = []
        """(peer, frames) to be sent."""
        self._order: bool | None = None if epoch else True  # None: a worker will know
        self.workers = Workers(clock)
        self._reports: dict[tuple[int, int], Report] = {}  # by engine and stage
        self.servers: set[Peer] = set()
        """The API servers."""
        self._log = RoutesLog(settings.log, settings.log_layers) if settings.log else None
        self._queries = Queries(self, clock)
        self._clock = clock

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
                self._queries.ask(peer, values)
            case "hello":
                self._on_hello(peer, *unpack_hello(values))
            case "server":
                self.servers.add(peer)
            case "register" | "finish" | "alias":
                if peer in self.servers:
                    self._on_sequence(kind, values, frames)
            case _:
                raise ValueError(f"unknown kind of message: {kind!r}")

    def _on_sequence(self, kind: str, values: dict[str, Any], frames: Frames) -> None:
        match kind:
            case "register" if not self.store.find(values["internal_id"]):
                prompt_ids = np.frombuffer(frames[1], np.int32) if len(frames) > 1 else None
                self._settle(self.sequences.register(Register(**values), prompt_ids))
            case "finish":
                output_ids = np.frombuffer(frames[1], np.int32)
                self._settle(self.sequences.finish(**values, output_ids=output_ids))
            case "alias":
                self._on_alias(**values)

    def tick(self) -> None:
        """Do what time demands; called at least every 50 ms."""
        for internal_id, rows in self.workers.overdue():
            self._settle(self.sequences.end(internal_id, rows))
        for sequence in self.sequences.overdue():
            self._settle(sequence, timed_out=True)
        self._queries.expire()
        if self.windows is not None:
            self.windows.tick()

    @property
    def is_capturing(self) -> bool:
        """Whether workers are to ship rows; True where only the collector before would know."""
        return self._order is not False

    def set_capturing(self, on: bool) -> None:
        """Tell every worker to ship rows, or to hold them back."""
        self._order = on
        self.outbox += [(peer, pack("capture", on=on)) for peer in self.workers]

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Keep no trace of running sequences, nor let the next collector keep one."""
        internal_ids = []
        for sequence in sequences:
            self.sequences.discard_ids(sequence)
            internal_ids.append(sequence.register.internal_id)
        forget = pack("forget", internal_ids=internal_ids)
        self.outbox += [(server, forget) for server in self.servers if internal_ids]

    def close(self) -> None:
        """Write out the log."""
        if self._log is not None:
            self._log.close()

    def _on_hello(
        self, peer: Peer, hello: Hello, is_capturing: bool, snapshot: Snapshot | None
    ) -> None:
        if not self.workers.fits(hello):
            logger.error("a worker with another model said hello; its routes are left out")
            return
        worker = self.workers.add(peer, hello, snapshot)
        if self.hello is None and (model := self.workers.model) is not None:
            self._begin(model)
        if self._order is None:  # what the collector before had ordered holds
            self._order = is_capturing
        if snapshot is not None:
            for internal_id in snapshot.ended:
                nothing = self.workers.end(
                    worker, internal_id, Rows.nothing(hello, CAUSES["restart"])
                )
                if nothing is not None:
                    self._settle(self.sequences.end_unless_told(internal_id, nothing))
        self.outbox.append((peer, pack("capture", on=self.is_capturing)))

    def _begin(self, model: Hello) -> None:
        self.hello = model
        self.counters = ExpertCounters(model.layers, model.num_experts)
        self.windows = CountWindows(self.counters, self._clock)
        if self.settings.metrics_window > self.windows.kept_s:
            logger.warning(
                "the load balance metrics look back %g s instead of %g: no more is kept of a "
                "model of %d layers of %d experts",
                self.windows.kept_s, self.settings.metrics_window,
                len(model.layers), model.num_experts,
            )  # fmt: skip
        self.refusal = self.settings.log_refusal(model.layers)
        if self._log is not None and self.refusal is None:
            self._log.begin(model)

    def _on_steps(self, peer: Peer, values: dict[str, Any], frames: Frames) -> None:
        worker = self.workers.get(peer)
        if worker is not None:
            for step in unpack_steps(values, frames, worker.hello):
                self._apply(worker, step)

    def _apply(self, worker: Reassembler, step: Step) -> None:
        is_first = self.workers.is_first(worker)
        self.stats.add_step(step, is_first=is_first)
        ended, written = worker.apply(step)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("step %d %s", step.seq, orjson.dumps(worker.describe(step)).decode())
        if written is not None and self.counters is not None:
            self.counters.add(written, worker.hello.layers, with_rows=is_first)
        for internal_id, part in ended:
            rows = self.workers.end(worker, internal_id, part)
            if rows is not None:
                self._settle(self.sequences.end(internal_id, rows))

    def _on_counts(self, peer: Peer, values: dict[str, Any], frames: Frames) -> None:
        worker = self.workers.get(peer)
        if worker is None:
            return
        hello = worker.hello
        shape = (len(PHASES), len(hello.layers), hello.num_experts)
        totals = np.frombuffer(frames[1], np.int64).reshape(shape)
        report = Report(selections=totals, rows=totals[:, 0].sum(-1) // hello.top_k, **values)
        place = hello.engine, hello.stage  # it may come again, on another connection
        # Its first report says where it stood: that was before this collector.
        before = self._reports.setdefault(place, report)
        if self.counters is None or report.steps == before.steps:
            return
        self._reports[place] = report
        new, is_first = report.since(before), self.workers.is_first(worker)
        self.stats.add_report(new, is_first=is_first)
        self.counters.add_counted(new.selections, new.rows * is_first, hello.layers)

    def _on_alias(self, internal_ids: list[str], alias: str) -> None:
        for internal_id in internal_ids:
            for sequence in self.sequences.find(internal_id):
                self.sequences.add_id(sequence, alias)
            for kept in self.store.find(internal_id):
                self.store.add_id(kept, alias)

    def _settle(self, sequence: Sequence | None, *, timed_out: bool = False) -> None:
        """Make the trace of a sequence on which everybody has reported."""
        if sequence is None or not (sequence.is_ready or timed_out):
            return
        ids, keep = tuple(sequence.ids), sequence.keep
        self.sequences.close(sequence)
        try:
            if keep and self.hello is not None:
                trace, cause = sequence.trace(
                    self.hello, timed_out=timed_out, with_token_ids=self.settings.token_ids == "on"
                )
                self.stats.add_trace(trace, cause)
                if self._log is not None and self.refusal is None:
                    self._log.write(trace)
                self.store.add(Kept(sequence.uid, trace, ids))
        except Exception:  # the others of this step, or of this tick, are not to suffer
            logger.exception("left out a trace that cannot be made, of %s", ids)
        self._queries.retry(ids)
