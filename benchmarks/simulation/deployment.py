"""A deployment around the simulated engine, with a transport that fails in every way it can.

What is real: the collector, the worker's encoder, the API server's journal. What is simulated: the
engine, and two links which behave as `moescope_service.link.Link` does (first in, first out; an
introduction at the start of a connection; what the worker puts while the collector is away is
encoded and left out, and the journal keeps what the API server tells), whose messages are delivered
whenever chance wants it.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from typing import Any

import numpy as np

from benchmarks.simulation.engine import MAX_DRAFTS, VOCABULARY, Engine, Output, truth
from benchmarks.simulation.kv import Seq
from benchmarks.simulation.link import SimLink
from benchmarks.simulation.parts import Clock, make_spec
from moescope.trace import RouteTrace, Source
from moescope.version_runs import MIXED
from moescope_service.capture.control import ControlEncoder, NewSequence, StepMessage
from moescope_service.capture.rows import Batch, StepRows
from moescope_service.collector.core import Collector
from moescope_service.collector.pages import Pages
from moescope_service.collector.sequences import WORKER_TIMEOUT_S
from moescope_service.frontend.journal import Journal
from moescope_service.messages import (
    Frames,
    Register,
    RequestKey,
    pack,
    pack_all,
    pack_introduction,
    unpack,
)
from moescope_service.queries import RoutesQuery, Wanted
from moescope_service.settings import Settings

FAULTS = ("rows_lost", "given_up", "duplicate", "pause", "kill", "kill_server", "abort")


@dataclasses.dataclass(frozen=True)
class Chances:
    """How often what happens, a step."""

    rows_lost: float = 0.0
    given_up: float = 0.0
    """A message that the link does not take."""
    duplicate: float = 0.0
    """Of the message that was delivered last."""
    pause: float = 0.0
    """Or resume."""
    kill: float = 0.0
    """Of the collector, which comes back some steps later."""
    kill_server: float = 0.0
    """Of the API server: another one takes the requests that follow."""
    abort: float = 0.0
    speculation: float = 0.0
    loads: float = 0.0
    """By a KV connector, of a sequence that waits."""
    weights: float = 0.0
    """An update of the weights begins or ends."""
    optimism: int = 0
    """By how many positions the scheduler may be ahead of the device."""


class Deployment:
    """Requests from their arrival to their traces.

    Args:
        rng: Decides everything that is random.
        num_requests: How many there are.
        chances: How often what goes wrong.
        num_blocks: Of the KV cache: few, so that they are used again and again.
    """

    def __init__(
        self, rng: random.Random, num_requests: int, chances: Chances, *, num_blocks: int = 12
    ) -> None:
        self.rng, self.chances = rng, chances
        self.spec = make_spec(block_size=3, num_blocks=num_blocks)
        self.engine = Engine(
            rng,
            self.spec,
            token_budget=rng.choice([4, 9, 30]),
            copies=True,
            speculation=chances.speculation,
            loads=chances.loads,
        )
        overshoot = MAX_DRAFTS if chances.optimism else 0
        self.encoder = ControlEncoder(0, self.spec.block_size, overshoot)
        self._message_bytes = rng.choice([40, 2**20])
        self.seqs: dict[str, Seq] = {}
        self.missing: dict[str, set[int]] = {}
        self.ended_in: dict[str, int] = {}
        """Epoch in which the engine ended each sequence."""
        self.happened: collections.Counter[str] = collections.Counter()
        self.traces: dict[str, RouteTrace] = {}
        self.followed: dict[str, list[RouteTrace]] = {}
        """Pages of each request, as they came while it ran, of the collector that there is."""
        self._is_over: set[str] = set()
        self.early: list[RouteTrace] = []
        """Traces that a collector had made before it was killed."""
        self._num_requests, self._next_step, self._is_capturing = num_requests, 0, True
        self._orphans: set[str] = set()
        self.weights_version, self._is_updating = 0, False
        self._untold: list[str] = []
        self.epoch = -1
        self.worker = SimLink("worker", self._introduce_worker, self._encode_step)
        self._begin_server()
        self._begin_collector()
        for link in (self.worker, self.server):
            link.connect()

    def run(self) -> None:
        """Go on until every request has its trace or never will have one."""
        number = 0
        while number < self._num_requests or self.engine.is_busy:
            if number < self._num_requests and self.rng.random() < 0.5:
                self._add(str(number))
                number += 1
            fault = self._choose_fault()
            self.happened[fault] += 1
            getattr(self, f"_{fault}", lambda: None)()
            self._step(fault)
            self._transport()
        for link in (self.worker, self.server):
            if link.is_away:
                link.connect()
        for link in self._in_some_order():
            link.send(None)
            link.deliver(self.collector, len(link.pipe))
        self._keep_traces()
        self.clock.now_s += WORKER_TIMEOUT_S + 1
        self.collector.tick()
        self._keep_traces()
        self._follow()

    def check(self) -> collections.Counter[str]:
        """No row is wrong, nor its version, and no trace that lacks a row says it is complete.

        Returns:
            How many traces there are, complete ones, and rows by source.

        Raises:
            AssertionError: One is, or does.
        """
        counts: collections.Counter[str] = collections.Counter()
        for trace in (*self.early, *self.traces.values()):
            seq = self.seqs[trace.request_id]
            here = trace.source != Source.MISSING
            _require(trace.num_rows <= max(len(seq.tokens) - 1, 0), f"{seq.name}: rows too many")
            counts["versions"] += len(trace.weights_versions)
            self._check_rows(trace)
            if trace.complete:
                tokens = None if trace.token_ids is None else trace.token_ids.tolist()
                _require(here.all(), f"{seq.name}: complete, and rows are missing")
                _require(trace.num_tokens == len(seq.tokens), f"{seq.name}: tokens are missing")
                _require(tokens == seq.tokens, f"{seq.name}: other tokens")
            counts["traces"] += 1
            counts["complete"] += trace.complete
            counts.update(Source(source).name.lower() for source in trace.source.tolist())
        return counts

    def check_followed(self, *, exactly: bool) -> int:
        """No row that came early is wrong; where ``exactly``, all of the trace came.

        A preemption may make a difference: a row that came may be missing in the trace, since its
        sequence ended before it was computed again, and one that was lost may be there.

        Returns:
            How many rows came before their request had its trace.
        """
        num_early = 0
        for name, pages in self.followed.items():
            followed = RouteTrace.joined(pages)
            self._check_rows(followed)
            num_early += sum(page.num_rows for page in pages if page.finish_reason is None)
            if exactly and name in self._is_over:
                trace = self.traces[name]
                _require(followed.num_rows == trace.num_rows, f"{name}: rows did not come")
                losses = self.engine.num_loads or self.happened.keys() - {"nothing", "abort"}
                if not (self.seqs[name].was_preempted and losses):
                    came = bool(followed.present[trace.present].all())
                    _require(came, f"{name}: rows are missing")
        return num_early

    def _check_rows(self, trace: RouteTrace) -> None:
        seq, here, version = self.seqs[trace.request_id], trace.present, trace.weights_version
        ids, weights = truth(
            seq.hashes[: trace.num_rows], self.spec, 0 if version is None else version
        )
        np.testing.assert_array_equal(trace.topk_ids[here], ids[here], seq.name)
        if trace.topk_weights is None:
            raise AssertionError(f"{seq.name}: no weights")
        np.testing.assert_array_equal(trace.topk_weights[here], weights[here], seq.name)

    def check_missing(self, *, exactly: bool) -> None:
        """Missing is what was lost; where ``exactly``, nothing else is, restarts or not."""
        for name, trace in self.traces.items():
            missing = set(np.flatnonzero(trace.source == Source.MISSING).tolist())
            expected = {p for p in self.missing.get(name, ()) if p < trace.num_rows}
            _require(missing >= expected, f"{name}: what was lost is there")
            if exactly and self.ended_in[name] == self.epoch and name not in self._orphans:
                _require(missing == expected, f"{name}: what was not lost is missing")
                _require(trace.complete == (not missing), f"{name}: complete or not, wrongly")

    # --- what happens

    def _choose_fault(self) -> str:
        drawn = self.rng.random()
        for fault in FAULTS:
            drawn -= getattr(self.chances, fault)
            if drawn < 0:
                return fault
        return "nothing"

    def _add(self, name: str) -> None:
        rng = self.rng
        common = [int(t) for t in f"{10**9 + 7 * rng.randrange(2):b}"]  # one of two beginnings
        prompt = common[: rng.randint(1, 14)] + [rng.randrange(VOCABULARY)] * rng.randint(0, 3)
        seq = Seq(name, prompt, len(prompt), rng.randint(1, 9), surplus=bool(rng.randrange(2)))
        self.seqs[name] = seq
        self.engine.add(seq)
        register = Register(
            internal_id=name, request_id=name, ids=[name], index=0, model="tiny", lora=None,
            prompt_len=len(prompt), created_s=float(name), keep=True,
        )  # fmt: skip
        frames = pack("register", [np.array(prompt, np.int32)], **dataclasses.asdict(register))
        self.journal.register(name, RequestKey(name, 0.0), frames)

    def _finish(self, seq: Seq, reason: str) -> None:
        if seq.name not in self._orphans:
            output = np.array(seq.tokens[seq.prompt_len :], np.int32)
            frames = pack("finish", [output], internal_id=seq.name, reason=reason)
            self.journal.finish(seq.name, frames)

    def _abort(self) -> None:
        running = [s for s in (*self.engine.running, *self.engine.waiting) if not s.is_over]
        if running:
            seq = self.rng.choice(running)
            self.engine.abort(seq)
            self._finish(seq, "abort")

    def _pause(self) -> None:
        self.collector.state.set_capturing(not self.collector.state.is_capturing)

    def _duplicate(self) -> None:
        link = self.rng.choice([self.worker, self.server])
        if link.last is not None:
            self.collector.handle(link.peer, link.last)

    def _kill(self) -> None:
        self._keep_traces()
        self.early += self.traces.values()
        self._begin_collector()
        self.engine.kv.forget_rows()

    def _kill_server(self) -> None:
        self._orphans |= self.seqs.keys()
        self._begin_server()

    def _begin_collector(self) -> None:
        self.clock = Clock()
        self.epoch += 1
        self.collector = Collector(Settings(), self.clock, epoch=self.epoch)
        self.traces, self.followed, self._is_over = {}, {}, set()
        for link in (self.worker, self.server):
            link.break_off()

    def _begin_server(self) -> None:
        self.journal = Journal()
        self.server = SimLink("server", self._introduce_server, source=self.journal)

    def _introduce_server(self) -> list[Frames]:
        return [self.journal.introduce()]

    def _introduce_worker(self) -> list[Frames]:
        is_capturing, worker_state = self._is_capturing, self.encoder.worker_state()
        return [pack_introduction(self.spec, is_capturing=is_capturing, worker_state=worker_state)]

    # --- a step

    def _step(self, fault: str) -> None:
        self._change_weights()
        output = self.engine.schedule()
        self.missing |= output.missing
        self.ended_in |= dict.fromkeys(output.finished_req_ids, self.epoch)
        rows = self._rows(output) if self._is_capturing else "paused"
        if fault == "rows_lost":
            rows = self.rng.choice(["queue_full", "hook_missed"])
        message = self._message(output, rows)
        is_shipped = not isinstance(rows, str) and not self.worker.is_away and fault != "given_up"
        self._untold = [*message.finished] if fault == "given_up" else []
        if fault != "given_up":
            self.worker.put(message)
        for seq in self.engine.execute(output, shipped=is_shipped):
            self._finish(seq, "length")

    def _rows(self, output: Output) -> Any:
        spans = output.batch
        hashes = [h for seq, start, count in spans for h in seq.row_hashes(start, count)]
        positions = [p for _, start, count in spans for p in range(start, start + count)]
        rows = truth(hashes, self.spec, MIXED if self._is_updating else self.weights_version)
        return StepRows(np.array(positions, np.int32), *rows)

    def _change_weights(self) -> None:
        if not self.chances.weights or self.rng.random() >= self.chances.weights:
            return
        self._is_updating = not self._is_updating and bool(self.rng.randrange(2))
        if not self._is_updating:
            self.weights_version += 1
            message = StepMessage(self._next_step, 0.0, 0.0)
            message.weights_version = self.weights_version
            self._next_step += 1
            self.worker.put(message)

    def _encode_step(self, message: StepMessage) -> list[Frames]:
        return pack_all([self.encoder.encode(message)], self._message_bytes)

    def _message(self, output: Output, rows: Any) -> StepMessage:
        new = [
            NewSequence(n.req_id, n.prompt_len, n.num_computed_tokens, n.block_ids)
            for n in output.scheduled_new_reqs
        ]
        message = StepMessage(
            self._next_step, 0.0, 0.0, [*self._untold, *output.finished_req_ids], new,
            output.scheduled_cached_reqs, output.kv_cache_block_copies or (),
        )  # fmt: skip
        message.loaded, message.filled = output.loaded, output.filled
        message.weights_version = MIXED if self._is_updating else self.weights_version
        self._next_step += 1
        if output.batch:
            counts = [count for _, _, count in output.batch]
            message.batch = Batch(
                [seq.name for seq, _, _ in output.batch],
                np.cumsum([0, *counts]).astype(np.int32),
                np.array([self._scheduled(seq, start) for seq, start, _ in output.batch], np.int32),
            )
            message.rows = rows
        return message

    def _scheduled(self, seq: Seq, start: int) -> int:
        ahead = self.chances.optimism and start >= seq.prompt_len
        return start + (self.rng.randint(0, MAX_DRAFTS) if ahead else 0)

    def _in_some_order(self) -> list[SimLink]:
        links = [self.worker, self.server]
        return links if self.rng.randrange(2) else links[::-1]

    def _transport(self) -> None:
        for link in self._in_some_order():
            count = self.rng.randrange(4)
            if link.is_away and count:
                link.connect()
            link.send(count)
            link.deliver(self.collector, count)
        for peer, frames in self.collector.state.outbox:
            kind, values = unpack(frames)
            if peer == self.worker.peer and kind == "capture":
                self._is_capturing = values["on"]
        self.collector.state.outbox.clear()
        self._follow()

    def _follow(self) -> None:
        """Ask for what is new of each request."""
        for name in self.seqs.keys() - self._is_over:
            pages = self.followed.get(name, [])
            start = pages[-1].start + pages[-1].num_rows if pages else 0
            wanted = [Wanted(request_id=name, start=start)]
            query = RoutesQuery(wanted=wanted, index=0, follows=True)
            reply = next(filter(None, Pages(self.collector.state, query).replies()))
            is_over = reply.found[0].status == "finished"
            new = [page for page in reply.traces() if page.num_rows or is_over]
            self.followed |= {name: [*pages, *new]} if new else {}
            self._is_over |= {name} if is_over else set()

    def _keep_traces(self) -> None:
        self.traces |= {kept.trace.request_id: kept.trace for kept in self.collector.state.store}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
