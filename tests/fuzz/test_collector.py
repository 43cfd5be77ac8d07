"""Whatever is sent to the collector: it goes on, and takes no more memory than the message."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import orjson
import psutil
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulation.parts import Clock, make_spec
from moescope_service.collector.core import Collector
from moescope_service.messages import (
    Admission,
    Register,
    Step,
    pack,
    pack_introduction,
    pack_steps,
)
from moescope_service.queries import (
    CaptureQuery,
    DeleteQuery,
    ExpertsQuery,
    InfoQuery,
    MetricsQuery,
    RecentQuery,
    ResetQuery,
    RoutesQuery,
    SettleQuery,
    WaitQuery,
    Wanted,
    pack_cancel,
    pack_query,
)
from moescope_service.runtime import collector_address
from moescope_service.settings import Settings

from .profile import fuzzed

MIB = 2**20
PEAK = 32 * MIB
"""What a message of some kilobytes may cost while it is taken in."""

SPEC = make_spec()
REGISTER = Register(
    internal_id="a-i", request_id="a", ids=["a", "a-i"], index=0, model="tiny", lora=None,
    prompt_len=4, created_s=1.0, keep=True,
)  # fmt: skip
STEP = Step(
    number=0, spans=np.array([[0, 0, 4]], np.int32), admitted=[Admission(0, "a-i", 4, 0, [0, 1])],
    topk_ids=np.zeros((4, 2, 2), np.uint8), topk_weights=np.zeros((4, 2, 2), np.float16),
)  # fmt: skip
VALID = [
    ("server", pack("server")),
    ("worker", pack_introduction(SPEC)),
    ("register", pack("register", [np.arange(4, dtype=np.int32)], **dataclasses.asdict(REGISTER))),
    ("steps", pack_steps([STEP])),
    ("finish", pack("finish", [np.arange(2, dtype=np.int32)], internal_id="a-i", reason="stop")),
    ("alias", pack("alias", internal_ids=["a-i"], alias="b")),
    ("cancel", pack_cancel(1)),
    *(
        ("query", pack_query(number, query))
        for number, query in enumerate(
            [
                RoutesQuery(wanted=[Wanted(request_id="a")]),
                RoutesQuery(wanted=[Wanted(request_id="a", uid=1)], index=0, follows=True),
                WaitQuery(request_ids=["a"], wait_s=1.0),
                DeleteQuery(request_id="a"),
                RecentQuery(limit=10),
                ExpertsQuery(window_s=10.0),
                ResetQuery(),
                CaptureQuery(on=False),
                InfoQuery(),
                MetricsQuery(),
                SettleQuery(wait_s=1.0),
            ]
        )
    ),
]

scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 9)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)  # fmt: skip


@st.composite
def mutated(draw):
    """A valid message, with one thing in it changed, left out, or cut."""
    _, frames = draw(st.sampled_from(VALID))
    control = orjson.loads(frames[0])
    arrays = [bytes(memoryview(np.ascontiguousarray(frame)).cast("B")) for frame in frames[1:]]
    what = draw(st.sampled_from(["value", "drop", "more", "deep", "cut", "frames", "nothing"]))
    place = draw(st.sampled_from(sorted(control)))
    match what:
        case "value":
            control[place] = draw(anything)
        case "drop":
            del control[place]
        case "more":
            control[draw(st.text(max_size=8))] = draw(anything)
        case "deep":
            _change_inside(draw, control)
        case "cut" if arrays:
            arrays[-1] = arrays[-1][: draw(st.integers(0, len(arrays[-1])))]
        case "frames":
            arrays = draw(st.lists(st.binary(max_size=40), max_size=4))
    return [orjson.dumps(control), *arrays]


def _change_inside(draw, value):
    """Change something at a random depth."""
    while True:
        keys = list(range(len(value))) if isinstance(value, list) else sorted(value)
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(value[key], dict | list) and value[key] and draw(st.booleans()):
            value = value[key]
        else:
            value[key] = draw(anything)
            return


raw = st.lists(st.binary(max_size=60), min_size=1, max_size=4)
messages = st.lists(
    st.tuples(st.sampled_from([b"worker", b"server", b"other"]), mutated() | raw), max_size=30
)


class Fuzzed:
    """A collector in this thread that is told anything."""

    def __init__(self):
        self.clock = Clock()
        settings = Settings(memory_bytes=4 * MIB, prefix_bytes=4 * MIB)
        self.collector = Collector(settings, self.clock)
        self.collector.handle(b"server", pack("server"))
        self.collector.handle(b"worker", [bytes(f) for f in pack_introduction(SPEC)])

    def tell(self, peer, frames):
        """Hand a message over as the process does, which logs what cannot be understood."""
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        with contextlib.suppress(Exception):  # as the collector's process does
            self.collector.handle(peer, frames)
        self.finish_work()
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before < PEAK, f"{(peak - before) / MIB:.0f} MiB for {frames}"

    def finish_work(self):
        for _ in range(1000):
            try:
                if not self.collector.work():
                    break
            except Exception:  # noqa: BLE001
                continue
        else:
            raise AssertionError("the work does not end")
        self.collector.state.outbox.clear()

    def pass_s(self, seconds):
        self.clock.now_s += seconds
        for _ in range(100):  # one that is due and cannot be done is not due any more
            try:
                self.collector.tick()
            except Exception:  # noqa: BLE001
                continue
            return
        raise AssertionError("ticks fail for ever")

    def serve(self, name):
        """Run a request of a worker and a server that come later; return its trace."""
        collector = self.collector
        worker, server = f"{name}-worker".encode(), f"{name}-server".encode()
        collector.handle(server, pack("server"))
        collector.handle(worker, pack_introduction(SPEC))
        register = dataclasses.replace(
            REGISTER, internal_id=f"{name}-i", request_id=name, ids=[name], created_s=7.0
        )
        collector.handle(server, pack("register", [np.arange(4, dtype=np.int32)],
                                      **dataclasses.asdict(register)))  # fmt: skip
        first = dataclasses.replace(STEP, admitted=[Admission(0, f"{name}-i", 4, 0, [0, 1])])
        collector.handle(worker, pack_steps([first]))
        collector.handle(server, pack("finish", [np.array([9], np.int32)],
                                      internal_id=f"{name}-i", reason="stop"))  # fmt: skip
        collector.handle(worker, pack_steps([Step(
            number=1, finished=[0], spans=np.empty((0, 3), np.int32))]))  # fmt: skip
        return [kept.trace for kept in collector.state.store if kept.trace.request_id == name]


@pytest.fixture(scope="module", autouse=True)
def _traced():
    tracemalloc.start(1)
    yield
    tracemalloc.stop()


@fuzzed
@given(messages)
def test_the_collector_goes_on(told):
    fuzz = Fuzzed()
    for peer, frames in told:
        fuzz.tell(peer, frames)
    fuzz.pass_s(1.0)
    fuzz.pass_s(400.0)
    state = fuzz.collector.state
    assert len(fuzz.collector._answers._waiting) == 0
    assert not fuzz.collector._answers._by_id
    assert state.store.size_bytes == sum(kept.size_bytes for kept in state.store)
    assert state.store.size_bytes <= state.store.limit_bytes


@fuzzed
@given(messages)
def test_what_runs_afterwards_is_whole_unless_the_worker_was_replaced(told):
    fuzz = Fuzzed()
    for peer, frames in told:
        if peer != b"worker":  # which alone says which rows there are
            fuzz.tell(peer, frames)
    (trace,) = fuzz.serve("later")
    assert trace.complete
    assert trace.num_rows == 4


def test_the_process_goes_on(served):
    """The real one, behind its socket: its memory too."""
    process = psutil.Process(served.deployment.collector.pid)
    before = process.memory_info().rss
    told = st.lists(mutated() | raw, min_size=1, max_size=20)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(collector_address())

        @fuzzed
        @given(told)
        def tell(messages):
            for frames in messages:
                if b'"kind":"worker"' not in frames[0] and b"capture" not in frames[0]:
                    socket.send_multipart(frames)
            socket.send_multipart(pack_query(10**6, InfoQuery()))
            while True:  # until it has read them all
                assert socket.poll(30_000), "the collector does not answer"
                if b'"number":1000000' in socket.recv_multipart()[0]:
                    break

        tell()
    assert served.deployment.collector.poll() is None
    assert process.memory_info().rss - before < 64 * MIB
    served.deployment.complete("after-garbage")
    answer = served.deployment.http.get("/routes/cmpl-after-garbage?wait_s=10")
    assert answer.json()["traces"][0]["complete"]
    assert Path(collector_address().removeprefix("ipc://")).exists()
