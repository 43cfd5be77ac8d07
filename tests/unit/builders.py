"""Small messages and a collector at hand, for the tests of the collector."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import orjson

from moescope import formats
from moescope.trace import RouteTrace
from moescope_service.collector.core import Collector
from moescope_service.messages import (
    Admission,
    Hello,
    Register,
    Step,
    pack,
    pack_hello,
    pack_steps,
)
from moescope_service.settings import Settings

WORKER, API = b"worker", b"api"


def make_hello(**changes: Any) -> Hello:
    values: dict[str, Any] = {
        "engine": 0,
        "num_engines": 1,
        "stage": 0,
        "num_stages": 1,
        "layers": [1, 3],
        "num_hidden_layers": 5,
        "num_experts": 8,
        "top_k": 2,
        "id_dtype": "uint8",
        "weights_dtype": "float16",
        "router_types": ["CPURouter"],
        "block_size": 4,
        "num_blocks": 32,
        "trust_prefix_hits": True,
        "model": "tiny",
        "device": "cpu",
        "seed": 0,
        "versions": {"moescope": "0", "vllm": "0.32.0", "torch": "2"},
    }
    return Hello(**(values | changes))


def make_rows(first: int, num_rows: int, hello: Hello | None = None) -> tuple[Any, Any]:
    """Rows that are told apart by a number: (ids, weights), ``[num_rows, num_layers, top_k]``."""
    hello = hello or make_hello()
    shape = (num_rows, len(hello.layers), hello.top_k)
    number = np.arange(first, first + num_rows)[:, None, None]
    place = np.arange(shape[1] * shape[2]).reshape(shape[1:])
    ids = (number * 3 + place) % hello.num_experts
    weights = (number + place / 16) / 64
    return ids.astype(hello.id_dtype), weights.astype(hello.weights_dtype)


def make_step(
    seq: int, spans: Any = (), *, rows: tuple[Any, Any] | None = None, **changes: Any
) -> Step:
    """A step whose row at position ``p`` is ``make_rows(p, 1)``, unless ``rows`` or ``lost``."""
    array = np.array(list(spans), np.int32).reshape(-1, 3)
    step = Step(seq=seq, time_s=0.0, host_s=0.001, spans=array, **changes)
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
    return int(bench.answered("info").values["store"]["bytes"])


class Clock:
    """Monotonic seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclasses.dataclass
class Reply:
    values: dict[str, Any]
    arrays: list[Any]


class Bench:
    """A collector with one worker and one API server, message by message."""

    def __init__(
        self, hello: Hello | bool | None = None, *, epoch: int = 0, **settings: Any
    ) -> None:
        self.clock = Clock()
        self.collector = Collector(Settings(**settings), self.clock, epoch=epoch)
        self.hello = hello if isinstance(hello, Hello) else make_hello()
        self._number = 0
        self._seq = 0
        self.collector.handle(API, pack("server"))
        if hello is not False:
            self.say_hello()

    def say_hello(self, peer: bytes = WORKER) -> None:
        self.collector.handle(peer, _wire(pack_hello(self.hello)))

    def step(self, spans: Any = (), **changes: Any) -> None:
        self.send(make_step(self._seq, spans, **changes))

    def send(self, step: Step, peer: bytes = WORKER) -> None:
        self._seq = step.seq + 1
        self.collector.handle(peer, _wire(pack_steps([step])))

    def count(self, peer: bytes, steps: int, rows: Any, lost: Any = None) -> None:
        """Report what a worker that counts has counted in all, all of it of expert 3.

        Args:
            peer: The worker.
            steps: How many steps that took.
            rows: By phase.
            lost: Rows that are in no count, by reason.
        """
        totals = np.zeros((2, len(self.hello.layers), self.hello.num_experts), np.int64)
        totals[:, :, 3] = np.array(rows)[:, None] * self.hello.top_k
        lost = {"hook_missed": 0, "paused": 0} | (lost or {})
        values = {"time_s": 0.0, "steps": steps, "host_s": 0.5, "lost": lost}
        self.collector.handle(peer, _wire(pack("counts", [totals], **values)))

    def lose_step(self) -> None:
        self._seq += 1

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

    def ask(self, op: str, **values: Any) -> int:
        """Ask, and return the number of the question."""
        if op == "routes":
            values.setdefault("wait_s", None)
        if op == "recent":
            values = {"limit": 50, "before": None} | values
        self._number += 1
        self.collector.handle(API, pack("query", number=self._number, op=op, **values))
        return self._number

    def answer(self, number: int) -> Reply | None:
        """Return the answer to a question, if it was given."""
        for peer, frames in self.collector.outbox:
            control = orjson.loads(frames[0])
            if peer == API and control.get("number") == number:
                return Reply(control, list(frames[1:]))
        return None

    def answered(self, op: str, **values: Any) -> Reply:
        reply = self.answer(self.ask(op, **values))
        assert reply is not None, f"{op} was not answered at once"
        return reply

    def status(self, request_id: str) -> str:
        return str(self.answered("routes", request_id=request_id, wait_s=0).values["status"])

    def traces(self, request_id: str) -> list[RouteTrace]:
        reply = self.answered("routes", request_id=request_id, wait_s=0)
        assert reply.values["status"] == "finished", reply.values
        return formats.load_npz(bytes(reply.arrays[0]))


def _wire(frames: Any) -> list[Any]:
    """What the other side of a socket gets: bytes that nobody writes to any more."""
    return [bytes(memoryview(frame).cast("B")) if memoryview(frame) else b"" for frame in frames]
