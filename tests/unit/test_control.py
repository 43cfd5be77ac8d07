"""Where a worker stands, as it tells a new collector."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import make_spec

from moescope.version_runs import MIXED
from moescope_service.capture.control import ControlEncoder, NewSequence, StepMessage
from moescope_service.capture.rows import Batch
from moescope_service.ids import short_id
from moescope_service.messages import (
    Admission,
    Ongoing,
    pack_introduction,
    unpack,
    unpack_introduction,
)

SIZE = 4


class Worker:
    """What a worker's thread leaves, step by step."""

    def __init__(self) -> None:
        self.encoder = ControlEncoder(0, SIZE)
        self.next_step = 0

    def step(
        self,
        *,
        new: Any = (),
        grown: Any = (),
        resumed: Any = (),
        finished: Any = (),
        spans: Any = (),
    ) -> Any:
        """New: (id, prompt length, cached, blocks); resumed: (id, cached, blocks)."""
        cached = SimpleNamespace(
            req_ids=[*(one[0] for one in grown), *(one[0] for one in resumed)],
            resumed_req_ids={one[0] for one in resumed},
            new_block_ids=[*((one[1],) for one in grown), *((one[2],) for one in resumed)],
            num_computed_tokens=[*(0 for _ in grown), *(one[1] for one in resumed)],
        )
        batch = Batch(
            [name for name, _, _ in spans],
            np.cumsum([0, *(count for _, _, count in spans)]).astype(np.int32),
            np.array([start for _, start, _ in spans], np.int32),
        )
        admitted = [NewSequence(*one[:3], (one[3],)) for one in new]
        message = StepMessage(
            self.next_step, 0.0, 0.0, finished, admitted, cached, (),
            batch if spans else None, "paused",
        )  # fmt: skip
        self.next_step += 1
        return self.encoder.encode(message)

    @property
    def ongoing(self) -> dict[str, Ongoing]:
        worker_state = self.encoder.worker_state()
        assert worker_state is not None
        assert worker_state.next_step == self.next_step
        return {one.admission.internal_id: one for one in worker_state.ongoing}


@pytest.fixture
def worker():
    return Worker()


def test_nothing_is_told_before_the_first_step(worker):
    assert worker.encoder.worker_state() is None


def test_tables_and_rows_of_running_sequences(worker):
    worker.step(new=[("a", 6, 4, [1, 2]), ("b", 3, 0, [3])], spans=[("a", 4, 2), ("b", 0, 3)])
    worker.step(grown=[("a", [5])], spans=[("a", 6, 1)])
    assert worker.ongoing == {
        "a": Ongoing(Admission(0, "a", 6, 4, [1, 2, 5]), 7),
        "b": Ongoing(Admission(1, "b", 3, 0, [3]), 3),
    }
    worker.step(finished=["a"])
    assert worker.ongoing.keys() == {"b"}
    assert worker.encoder.worker_state().ended == ["a"]


def test_the_number_of_the_weights(worker):
    for number in (2, MIXED):
        message = StepMessage(worker.next_step, 0.0, 0.0, weights_version=number)
        assert worker.encoder.encode(message).weights_version == number
        worker.next_step += 1
    assert worker.encoder.worker_state().weights_version == 2


def test_long_ids_of_vllm_are_told_short(worker):
    long_ids = [f"{'x' * 10**6}{number}" for number in range(2)]
    a, b = map(short_id, long_ids)
    step = worker.step(new=[(one, 6, 0, [n]) for n, one in enumerate(long_ids)])
    assert [one.internal_id for one in step.admitted] == [a, b]
    worker.step(grown=[(long_ids[0], [5])], spans=[(long_ids[0], 6, 1)])
    step = worker.step(resumed=[(long_ids[1], 0, [7])])
    assert [one.internal_id for one in step.resumed] == [b]
    assert worker.ongoing[a] == Ongoing(Admission(0, a, 6, 0, [0, 5]), 7)
    step = worker.step(finished=[long_ids[0], "y" * 10**6])
    assert (step.finished, step.finished_unseen) == ([0], [short_id("y" * 10**6)])
    assert worker.encoder.worker_state().ended == [a, short_id("y" * 10**6)]


def test_it_survives_the_wire(worker):
    worker.step(new=[("a", 6, 4, [1, 2])], spans=[("a", 4, 2)])
    worker.step(finished=["gone"])
    worker_state = worker.encoder.worker_state()
    _, values = unpack(
        pack_introduction(make_spec(), is_capturing=False, worker_state=worker_state)
    )
    assert unpack_introduction(values) == (make_spec(), False, worker_state, "")


@pytest.mark.parametrize("taker", ["new", "grown", "resumed", "unknown"])
def test_blocks_that_a_preempted_sequence_lost_are_not_its_own(worker, taker):
    """Nobody says that it was preempted: its blocks are in somebody else's table."""
    worker.step(new=[("a", 12, 0, [1, 2, 3])], spans=[("a", 0, 12)])
    match taker:
        case "new":
            worker.step(new=[("b", 9, 4, [9, 2, 7])])
        case "grown":
            worker.step(new=[("b", 4, 0, [9])])
            worker.step(grown=[("b", [2])])
        case "resumed":
            worker.step(new=[("b", 4, 0, [9])])
            worker.step(resumed=[("b", 0, [2])])
        case "unknown":  # its admission was given up
            worker.step(grown=[("b", [2])])
    assert worker.ongoing["a"] == Ongoing(Admission(0, "a", 12, 0, [1]), 12)


def test_a_shared_block_is_everybodys(worker):
    worker.step(new=[("a", 8, 0, [1, 2])], spans=[("a", 0, 8)])
    worker.step(new=[("b", 9, 8, [1, 2, 3])])
    assert worker.ongoing["a"].admission.block_ids == [1, 2]
    assert worker.ongoing["b"].admission.block_ids == [1, 2, 3]


def test_a_resumed_sequence_has_its_new_table(worker):
    worker.step(new=[("a", 8, 0, [1, 2])], spans=[("a", 0, 8)])
    worker.step(resumed=[("a", 4, [1, 5])])
    assert worker.ongoing["a"] == Ongoing(Admission(0, "a", 8, 0, [1, 5]), 8)


def test_after_a_gap_nothing_of_before_is_told(worker):
    """An admission or a block may have been in what was given up."""
    worker.step(new=[("a", 8, 0, [1, 2]), ("b", 8, 0, [3, 4])])
    worker.next_step += 1
    worker.step(new=[("c", 4, 0, [5])], resumed=[("b", 0, [6, 7])])
    assert worker.ongoing.keys() == {"b", "c"}
    step = worker.step(finished=["a", "c"])
    assert (step.finished, step.finished_unseen) == ([0], ["a"])
    assert worker.step(new=[("d", 4, 0, [8])]).admitted[0].handle == 0, "handles come back"


def test_handles_of_ends_that_were_given_up_come_back(worker):
    worker.step(new=[(f"{n}", 4, 0, [n]) for n in range(1000)])
    worker.next_step += 1  # all have ended in there
    assert worker.step(new=[("z", 4, 0, [1])]).admitted[0].handle == 0


def test_what_runs_over_a_gap_has_nobodys_handle(worker):
    """The collector does not know it, and so leaves its rows out until its end."""
    worker.step(new=[("a", 8, 0, [1, 2]), ("b", 8, 0, [3, 4])], spans=[("a", 0, 4), ("b", 0, 4)])
    worker.next_step += 1
    step = worker.step(spans=[("b", 5, 1), ("a", 5, 1)])
    (c,) = worker.step(new=[("c", 4, 0, [5])], spans=[("c", 0, 4)]).admitted
    assert c.handle not in step.spans[:, 0]
    step = worker.step(finished=["a", "b", "c"])
    assert (step.finished, step.finished_unseen) == ([c.handle], ["a", "b"])


def test_a_step_that_cannot_be_encoded_is_a_gap(worker):
    worker.step(new=[("a", 8, 0, [1, 2])])
    with pytest.raises(TypeError):
        worker.encoder.pack([StepMessage(1, 0.0, 0.0, None)])
    assert worker.encoder.worker_state().ongoing == []
    worker.next_step = 2
    worker.step()
    assert worker.ongoing == {}
