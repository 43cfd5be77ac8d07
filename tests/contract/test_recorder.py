"""The worker's side: every step is told, rows are dropped by name."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import zmq
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from benchmarks.simulation.engine import Engine as SimEngine
from benchmarks.simulation.kv import Seq
from moescope_service.capture import layout_v1, layout_v2
from moescope_service.capture.control import ControlEncoder, NewSequence, StepMessage
from moescope_service.capture.rows import Batch, StepRows
from moescope_service.messages import pack, unpack, unpack_steps
from tests.unit.sim_encoder import SimEncoder
from tests.waiting import DEADLINE_S, wait_until

from .fake_engine import SPEC, Engine, rows_of


class Collector:
    """A bound socket: what the recorder sent."""

    def __init__(self, socket):
        self.socket = socket
        self.peer = None
        self.waiting = []

    def receive(self):
        assert self.socket.poll(DEADLINE_S * 1000), "no message came"
        self.peer, *frames = self.socket.recv_multipart()
        kind, values = unpack(frames)
        return kind, unpack_steps(values, frames, SPEC) if kind == "steps" else values

    def steps(self, number):
        while len(self.waiting) < number:
            self.waiting += self.receive()[1]
        taken, self.waiting = self.waiting[:number], self.waiting[number:]
        return taken


@pytest.fixture
def address(tmp_path_factory):
    return f"ipc://{tmp_path_factory.mktemp('z') / 's'}"


@pytest.fixture
def collector(address):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        yield Collector(socket)


@pytest.fixture
def engine(address):
    engine = Engine(address)
    yield engine
    engine.recorder.close()


def test_the_introduction_comes_first(engine, collector):
    kind, values = collector.receive()
    assert (kind, values["layers"], values["model"]) == ("worker", [1, 3], "tiny")


def test_steps_are_numbered_and_timed(engine, collector):
    a = engine.start("a")
    b = engine.start("b")
    engine.step([(b, 1), (a, 1)])
    engine.step([(a, 1)], finished=[b])
    engine.step(finished=[a])
    collector.receive()
    steps = collector.steps(6)
    assert [step.number for step in steps] == [0, 1, 2, 3, 4, 5]
    # Ends are told before the model runs, in messages of their own.
    assert [step.spans.tolist() for step in steps] == [
        [[0, 0, 5]], [[1, 0, 5]], [[1, 5, 1], [0, 5, 1]], [], [[0, 6, 1]], [],
    ]  # fmt: skip
    assert [step.finished for step in steps] == [[], [], [], [1], [], [0]]
    assert all(0 <= step.hook_s < 1 and step.time_s > 1e9 for step in steps)
    assert steps[2].hook_s > 0
    assert steps[2].topk_ids.shape == (2, 2, 2)
    assert steps[5].topk_ids is None
    assert steps[5].lost is None


def test_block_tables_are_those_of_their_step(engine, collector):
    """The link's thread reads a step later, when vLLM has let the lists of the tables grow."""
    a = engine.start("a")
    for _ in range(8):
        engine.step([(a, 1)])
    collector.receive()
    first, *later = collector.steps(9)
    assert [one.block_ids for one in first.admitted] == [a.block_ids[:2]]
    grown = [block for step in later for _, block_ids in step.grown for block in block_ids]
    assert grown == a.block_ids[2:]


def test_a_layer_that_did_not_write(engine, collector):
    a = engine.start("a")
    engine.step([(a, 1)], hooked=False)
    collector.receive()
    good, bad = collector.steps(2)
    assert (good.lost, bad.lost, bad.topk_ids) == (None, "hook_missed", None)
    assert bad.spans.tolist() == [[0, 5, 1]]


def test_pause_and_resume(engine, collector):
    a = engine.start("a")
    collector.receive()
    assert collector.steps(1)[0].lost is None
    for on, lost in ((False, "paused"), (True, None)):
        collector.socket.send_multipart([collector.peer, *pack("capture", on=on)])
        wait_until(lambda on=on: engine.recorder._is_capturing == on, "the message arrives")
        engine.step([(a, 1)])
        assert collector.steps(1)[0].lost == lost


def test_rows_are_dropped_where_nobody_takes_them_and_control_is_not(address):
    engine = Engine(address, max_rows_bytes=20_000)  # nobody is bound yet
    a = engine.start("a")
    for _ in range(200):
        engine.step([(a, 1)])
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        collector = Collector(socket)
        collector.receive()
        steps = collector.steps(201)
    assert [step.number for step in steps] == list(range(201))
    lost = [step.lost for step in steps]
    assert lost[0] is None
    assert set(lost) == {None, "queue_full"}
    assert all((step.topk_ids is None) == (step.lost is not None) for step in steps)
    assert steps[-1].spans.tolist() == [[0, 204, 1]]
    engine.recorder.close()


def test_the_recorder_outlives_what_its_link_gave_up(address):
    """Admissions that were given up leave sequences that it does not know: they are left out."""
    deaths = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", deaths.append)
        engine = Engine(address, max_rows_bytes=20_000)
        link = engine.recorder._link
        wait_until(lambda: link.waiting_bytes == 0, "the introduction is in the socket")
        for number in range(40):  # fill the socket's own queue
            engine.start(f"before-{number}")
        link._max_bytes = 0  # as if it had waited for minutes
        a = engine.start("a")
        assert link.num_given_up > 0
        link._max_bytes = 2**30
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(address)
            collector = Collector(socket)
            engine.step([(a, 1)])
            b = engine.start("b")
            engine.step([(a, 4), (b, 1)], finished=[])
            last = engine.recorder._next_step - 1
            numbers = []
            while not numbers or numbers[-1] != last:
                if not socket.poll(DEADLINE_S * 1000):
                    break
                kind, steps = collector.receive()
                if kind == "steps":
                    numbers += [step.number for step in steps]
        engine.recorder.close()
    assert not deaths, f"the link's thread died: {deaths[0].exc_value!r}"
    assert numbers[-1] == last


def test_ends_that_nobody_took_are_told_later(engine, collector):
    link = engine.recorder._link
    a, b = engine.start("a"), engine.start("b")
    collector.receive()
    collector.steps(2)
    max_bytes, link._max_bytes = link._max_bytes, -1  # as if it had waited for minutes
    engine.step([(b, 1)], finished=[a])
    engine.step([(b, 1)], finished=[b])
    assert link.num_given_up == 4
    link._max_bytes = max_bytes
    engine.step()
    engine.start("c")
    ends, begins = collector.steps(2)
    assert (ends.number, ends.finished, ends.finished_unseen) == (6, [], ["a", "b"])
    assert [(one.handle, one.internal_id) for one in begins.admitted] == [(0, "c")]


def real_output(output):
    """The simulated engine's step in vLLM's own dataclasses."""
    real = SchedulerOutput.make_empty()
    real.finished_req_ids = output.finished_req_ids
    real.scheduled_new_reqs = [
        NewRequestData(new.req_id, [0] * new.prompt_len, [], None, None, new.block_ids,
                       new.num_computed_tokens, None)
        for new in output.scheduled_new_reqs
    ]  # fmt: skip
    cached = output.scheduled_cached_reqs
    real.scheduled_cached_reqs = CachedRequestData(
        cached.req_ids, cached.resumed_req_ids, [], {}, cached.new_block_ids,
        cached.num_computed_tokens, [],
    )  # fmt: skip
    copies = output.kv_cache_block_copies
    real.kv_cache_block_copies = copies and [
        KVCacheBlockCopy(src_block_id=c.src_block_id, dst_block_id=c.dst_block_id) for c in copies
    ]
    return real


def test_the_simulated_engine_of_the_unit_tests_speaks_as_the_real_encoder():
    for seed in range(20):
        rng = random.Random(seed)
        spec = SPEC.__class__(**{f: getattr(SPEC, f) for f in SPEC.__slots__} | {"num_blocks": 14})
        engine = SimEngine(rng, spec, copies=True)
        mine, real = SimEncoder(spec), ControlEncoder(0, SPEC.block_size)
        for number in range(6):
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, 14))]
            engine.add(Seq(str(number), prompt, len(prompt), rng.randint(1, 6), surplus=False))
        while engine.is_busy:
            output = engine.schedule()
            want = mine.encode(output)
            batch = None
            if output.batch:
                starts, counts = ([one[i] for one in output.batch] for i in (1, 2))
                batch = Batch([seq.name for seq, _, _ in output.batch],
                              np.cumsum([0, *counts]).astype(np.int32),
                              np.array(starts, np.int32))  # fmt: skip
            vllm_output = real_output(output)
            got = real.encode(StepMessage(
                want.number, 0.0, 0.0, vllm_output.finished_req_ids,
                [NewSequence(new.req_id, new.prompt_len, new.num_computed_tokens, new.block_ids)
                 for new in vllm_output.scheduled_new_reqs],
                vllm_output.scheduled_cached_reqs, vllm_output.kv_cache_block_copies or (), batch,
            ))  # fmt: skip
            for name in (
                "finished",
                "finished_unseen",
                "admitted",
                "resumed",
                "grown",
                "block_copies",
            ):
                assert getattr(got, name) == getattr(want, name), (seed, name)
            np.testing.assert_array_equal(got.spans, want.spans)
            engine.execute(output, shipped=True)
            for seq in [*engine.running, *engine.waiting]:
                if rng.random() < 0.05:
                    engine.abort(seq)


def test_the_batch_of_the_v1_runner():
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(
            num_reqs=2, req_ids=["a", "b", "old"], num_computed_tokens_cpu=np.array([5, 40, 7])
        ),
        query_start_loc=SimpleNamespace(np=np.array([0, 3, 4, 9], np.int32)),
    )
    batch = layout_v1.read_batch(runner)
    runner.query_start_loc.np[:] = runner.input_batch.num_computed_tokens_cpu[:] = 0  # next step
    assert batch.internal_ids == ["a", "b"]
    assert batch.first_row.tolist() == [0, 3, 4]
    assert batch.scheduled_position.tolist() == [5, 40]


def test_the_batch_of_the_v2_runner():
    batch = SimpleNamespace(
        num_reqs=2, req_ids=["a", "b"], query_start_loc_np=np.array([0, 3, 4, 4, 4], np.int32),
        num_computed_tokens_np=np.array([5, 40], np.int32),
    )  # fmt: skip
    runner = SimpleNamespace(execute_model_state=SimpleNamespace(input_batch=batch))
    found = layout_v2.read_batch(runner)
    assert found.internal_ids == ["a", "b"]
    assert found.first_row.tolist() == [0, 3, 4]
    assert found.scheduled_position.tolist() == [5, 40]
    runner.execute_model_state = None
    assert layout_v2.read_batch(runner) is None


def message_of(rows, overshoot=0):
    batch = Batch(["a", "b"], np.array([0, 3, 4], np.int32), np.array([1, 40], np.int32))
    encoder = ControlEncoder(0, SPEC.block_size, overshoot)
    return encoder.encode(StepMessage(0, 0.0, 0.0, batch=batch, rows=rows))


def test_positions_are_the_devices():
    """Speculation makes the host's positions too high."""
    rows = StepRows(np.array([0, 1, 2, 38]), *rows_of(0, 4))
    assert message_of(rows).spans.tolist() == [[0, 0, 3], [1, 38, 1]]


def test_lost_rows_are_taken_to_be_wherever_they_may_be():
    """A position that is too high would leave a rejected draft's row in place."""
    step = message_of("queue_full", overshoot=4)
    assert step.lost == "queue_full"
    assert step.spans.tolist() == [[0, 0, 4], [1, 36, 5]]


def test_rows_that_turn_out_to_be_of_another_step():
    rows = SimpleNamespace(read=lambda: None, size_bytes=0)
    step = message_of(rows)
    assert (step.lost, step.topk_ids) == ("hook_missed", None)
    assert step.spans.tolist() == [[0, 1, 3], [1, 40, 1]]


def test_rows_that_the_link_does_not_take_are_given_up(engine):
    given_up = []
    rows = SimpleNamespace(size_bytes=8, discard=lambda: given_up.append(1))
    engine.sink.take = lambda num_rows: rows
    engine.recorder._link._max_bytes = -1
    engine.start("a")
    assert given_up == [1]


def test_rows_are_waited_for_once_and_their_room_is_given_back():
    log = []

    class Pending:
        size_bytes = 8

        def __init__(self, name):
            self.name = name

        def wait(self):
            log.append(f"wait {self.name}")

        def read(self):
            log.append(f"read {self.name}")
            return StepRows(np.array([0]), *rows_of(0, 1))

        def release(self):
            log.append(f"release {self.name}")

    encoder = ControlEncoder(0, SPEC.block_size)
    batch = Batch(["a"], np.array([0, 1], np.int32), np.array([0], np.int32))
    messages = [
        StepMessage(number, 0.0, 0.0, batch=batch, rows=rows)
        for number, rows in enumerate([Pending(0), "paused", Pending(1)])
    ]
    (frames,) = encoder.pack(messages)
    assert log == ["wait 1", "read 0", "read 1", "release 0", "release 1"]
    steps = unpack_steps(unpack(frames)[1], [bytes(memoryview(f)) for f in frames], SPEC)
    assert [step.lost for step in steps] == [None, "paused", None]
