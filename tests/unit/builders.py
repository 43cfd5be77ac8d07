"""Small messages and a collector at hand, for the tests of the collector."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np

from benchmarks.simulation.parts import Clock, make_spec
from moescope.trace import RouteTrace
from moescope_service.collector.core import Collector
from moescope_service.messages import (
    Admission,
    CaptureSpec,
    Register,
    Step,
    pack,
    pack_introduction,
    pack_steps,
    unpack,
)
from moescope_service.queries import (
    DeleteQuery,
    DeleteReply,
    Found,
    InfoQuery,
    Query,
    Reply,
    RoutesQuery,
    RoutesReply,
    WaitQuery,
    Wanted,
    pack_query,
    unpack_reply,
)
from moescope_service.settings import Settings

R = TypeVar("R", bound=Reply)

WORKER, API = b"worker", b"api"


def make_rows(first: int, num_rows: int, spec: CaptureSpec | None = None) -> tuple[Any, Any]:
    """Rows that are told apart by a number: (ids, weights), ``[num_rows, num_layers, top_k]``."""
    spec = spec or make_spec()
    shape = (num_rows, len(spec.layers), spec.top_k)
    number = np.arange(first, first + num_rows)[:, None, None]
    place = np.arange(shape[1] * shape[2]).reshape(shape[1:])
    ids = (number * 3 + place) % spec.num_experts
    weights = (number + place / 16) / 64
    return ids.astype(spec.id_dtype), weights.astype(spec.weights_dtype)


def make_step(
    number: int, spans: Any = (), *, rows: tuple[Any, Any] | None = None, **changes: Any
) -> Step:
    """A step whose row at position ``p`` is ``make_rows(p, 1)``, unless ``rows`` or ``lost``."""
    array = np.array(list(spans), np.int32).reshape(-1, 3)
    step = Step(number=number, time_s=0.0, hook_s=0.001, spans=array, **changes)
    if step.lost is None and len(array):
        if rows is None:
            parts = [make_rows(start, length) for _, start, length in array.tolist()]
            rows = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        step.topk_ids, step.topk_weights = rows
    return step


def admit(handle: int, name: str, prompt_len: int, blocks: list[int], cached: int = 0) -> Admission:
    return Admission(handle, name, prompt_len, cached, blocks)


def make_register(name: str, **changes: Any) -> Register:
    values: dict[str, Any] = {
        "internal_id": f"{name}-i",
        "request_id": name,
        "ids": [f"{name}-i", name],
        "index": 0,
        "model": "tiny",
        "lora": None,
        "prompt_len": 4,
        "created_s": 100.0,
        "keep": True,
    }
    values |= changes
    return Register(**values)


def trace_size() -> int:
    """Bytes that one trace of `Bench.run` takes in the store."""
    bench = Bench()
    bench.run("a")
    return int(bench.answered(InfoQuery()).info.store.bytes)


class Bench:
    """A collector with one worker and one API server, message by message."""

    def __init__(
        self, spec: CaptureSpec | bool | None = None, *, epoch: int = 0, **settings: Any
    ) -> None:
        self.clock = Clock()
        self.collector = Collector(Settings(**settings), self.clock, epoch=epoch)
        self.spec = spec if isinstance(spec, CaptureSpec) else make_spec()
        self._number = 0
        self._asked: dict[int, type[Reply]] = {}
        self._next_step = 0
        self.collector.handle(API, pack("server"))
        if spec is not False:
            self.introduce_worker()

    def introduce_worker(self, peer: bytes = WORKER) -> None:
        self.collector.handle(peer, _wire(pack_introduction(self.spec)))

    def step(self, spans: Any = (), **changes: Any) -> None:
        self.send(make_step(self._next_step, spans, **changes))

    def send(self, step: Step, peer: bytes = WORKER) -> None:
        self._next_step = step.number + 1
        self.collector.handle(peer, _wire(pack_steps([step])))

    def count(self, peer: bytes, steps: int, rows: Any, lost: Any = None) -> None:
        """Report what a worker that counts has counted in all, all of it of expert 3.

        Args:
            peer: The worker.
            steps: How many steps that took.
            rows: By phase.
            lost: Rows that are in no count, by reason.
        """
        totals = np.zeros((2, len(self.spec.layers), self.spec.num_experts), np.int64)
        totals[:, :, 3] = np.array(rows)[:, None] * self.spec.top_k
        lost = {"hook_missed": 0, "paused": 0} | (lost or {})
        values = {"time_s": 0.0, "steps": steps, "hook_s": 0.5, "lost": lost}
        self.collector.handle(peer, _wire(pack("counts", [totals], **values)))

    def lose_step(self) -> None:
        self._next_step += 1

    def register(self, name: str, prompt: Any = (1, 2, 3, 4), **changes: Any) -> None:
        message = make_register(name, prompt_len=len(prompt), **changes)
        self.collector.handle(
            API,
            _wire(pack("register", [np.array(prompt, np.int32)], **dataclasses.asdict(message))),
        )

    def finish(self, internal_id: str, output: Any = (5, 6), reason: str = "stop") -> None:
        frames = pack(
            "finish", [np.array(output, np.int32)], internal_id=internal_id, reason=reason
        )
        self.collector.handle(API, _wire(frames))

    def alias(self, alias: str, *internal_ids: str) -> None:
        self.collector.handle(API, pack("alias", internal_ids=list(internal_ids), alias=alias))

    def start(self, name: str, handle: int = 0, blocks: Any = (0, 1), **changes: Any) -> None:
        """Register a request with 4 prompt tokens and route its prompt and one more token."""
        self.register(name, **changes)
        internal_id = changes.get("internal_id", f"{name}-i")
        self.step([(handle, 0, 4)], admitted=[admit(handle, internal_id, 4, list(blocks))])
        self.step([(handle, 4, 1)])

    def end(self, handle: int = 0) -> None:
        self.step(finished=[handle])

    def run(self, name: str, handle: int = 0, blocks: Any = (0, 1), **changes: Any) -> None:
        """Start a request and let it end with two output tokens."""
        self.start(name, handle, blocks, **changes)
        self.finish(changes.get("internal_id", f"{name}-i"))
        self.end(handle)

    def pass_s(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.collector.tick()

    def ask(self, query: Query[Any]) -> int:
        """Send a query, and return its number."""
        self._number += 1
        self._asked[self._number] = query.reply
        self.collector.handle(API, _wire(pack_query(self._number, query)))
        return self._number

    def reply(self, number: int) -> Any:
        """Return the reply to a query; None where there is none yet."""
        for peer, frames in self.collector.state.outbox:
            kind, values = unpack(frames)
            if peer == API and kind == "reply" and values["number"] == number:
                return unpack_reply(self._asked[number], values, frames)
        return None

    def answered(self, query: Query[R]) -> R:
        number = self.ask(query)
        while self.collector.work():
            pass
        reply: R | None = self.reply(number)
        assert reply is not None, f"{query} was not answered at once"
        return reply

    def routes(self, request_id: str, start: int = 0, **limits: Any) -> tuple[Found, RoutesReply]:
        """Return what an id finds, and the reply that has its traces."""
        wanted = [Wanted(request_id=request_id, start=start)]
        reply = self.answered(RoutesQuery(wanted=wanted, **limits))
        return reply.found[0], reply

    def status(self, request_id: str) -> str:
        return self.routes(request_id)[0].status

    def traces(self, request_id: str) -> list[RouteTrace]:
        found, reply = self.routes(request_id)
        assert found.status == "finished", reply
        traces = reply.traces()
        return [traces[number] for number in found.traces]

    def wait(self, *request_ids: str, wait_s: float | None = None) -> int:
        """Wait for the end of requests; returns the number of the query."""
        return self.ask(WaitQuery(request_ids=list(request_ids), wait_s=wait_s))

    def delete(self, request_id: str, owner: str | None = None) -> DeleteReply:
        """Delete what an id finds."""
        number = self.ask(DeleteQuery(request_id=request_id, owner=owner))
        while self.collector.work():
            pass
        reply: DeleteReply = self.reply(number)
        return reply


def _wire(frames: Any) -> list[Any]:
    """What the other side of a socket gets: bytes that nobody writes to any more."""
    return [bytes(memoryview(frame).cast("B")) if memoryview(frame) else b"" for frame in frames]
