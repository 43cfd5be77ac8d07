"""Pipeline stages and data-parallel engines: who has which rows of a sequence."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from builders import admit, make_rows, make_spec, make_step

from moescope.trace import Source
from moescope.version_runs import MIXED
from moescope_service.collector.arena import FILLED, RowsOfBlock
from moescope_service.collector.rows import CAUSES, Rows
from moescope_service.collector.workers import STAGE_TIMEOUT_S, Workers, merged_rows
from moescope_service.messages import CaptureSpec, WorkerState
from moescope_service.processes import Process


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def stage(number: int, layers: list[int], engine: int = 0, **changes: object) -> CaptureSpec:
    return make_spec(stage=number, num_stages=2, layers=layers, engine=engine, **changes)


def part(spec: CaptureSpec, num_rows: int, missing: dict[int, str] | None = None) -> Rows:
    ids, weights = make_rows(spec.stage * 100, num_rows, spec)
    source = np.full(num_rows, Source.COMPUTED, np.uint8)
    cause = np.full(num_rows, FILLED, np.uint8)
    for row, name in (missing or {}).items():
        source[row], cause[row] = Source.MISSING, CAUSES[name]
    return Rows(spec.layers, ids, weights, source, cause, 0, np.zeros(num_rows, np.int32))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def workers(clock: Clock) -> Workers:
    return Workers(clock)


def test_the_model_is_what_all_stages_of_an_engine_capture(workers: Workers) -> None:
    workers.add(b"late", stage(1, [4, 6], router_types=["Biased"], num_engines=2), None)
    assert workers.spec is None
    workers.add(b"early", stage(0, [1, 3], router_types=["Grouped"], num_engines=2), None)
    assert workers.spec is not None
    assert workers.spec.layers == [1, 3, 4, 6]
    assert workers.spec.router_types == ["Biased", "Grouped"]
    assert not workers.are_complete  # the second engine is yet to come
    for number, layers in enumerate(([1, 3], [4, 6])):
        workers.add(b"%d" % number, stage(number, layers, engine=1, num_engines=2), None)
    assert workers.are_complete
    assert len(list(workers)) == 4


def test_a_worker_of_another_model_does_not_fit(workers: Workers) -> None:
    workers.add(b"a", stage(0, [1, 3]), None)
    assert workers.fits(stage(1, [4, 6]))
    assert workers.fits(stage(0, [1, 3], engine=1))
    assert not workers.fits(stage(0, [1, 2], engine=1))
    assert not workers.fits(stage(1, [3, 4]))
    assert not workers.fits(stage(1, [4, 6], num_experts=9))
    assert not workers.fits(stage(1, [4, 6], top_k=3))


def test_a_sequence_has_ended_when_every_stage_has_told_so(workers: Workers) -> None:
    second, first = stage(1, [4, 6]), stage(0, [1, 3])
    late = workers.add(b"late", second, None)
    early = workers.add(b"early", first, None)
    assert workers.is_first(early)
    assert not workers.is_first(late)
    assert workers.end(late, "a", part(second, 3)) is None
    assert workers.end(early, "b", part(first, 2)) is None
    rows = workers.end(early, "a", part(first, 3))
    assert rows is not None
    assert rows.layers == [1, 3, 4, 6]
    np.testing.assert_array_equal(rows.topk_ids[:, :2], part(first, 3).topk_ids)
    np.testing.assert_array_equal(rows.topk_ids[:, 2:], part(second, 3).topk_ids)
    np.testing.assert_array_equal(rows.topk_weights[:, 2:], part(second, 3).topk_weights)
    assert (rows.source == Source.COMPUTED).all()
    rows = workers.end(late, "b", part(second, 2))
    assert rows is not None
    assert len(rows.source) == 2


def test_engines_end_their_own_sequences(workers: Workers) -> None:
    specs = [make_spec(engine=number, num_engines=2) for number in range(2)]
    for number, spec in enumerate(specs):
        worker = workers.add(b"%d" % number, spec, None)
        assert workers.is_first(worker)
        assert workers.end(worker, f"of-{number}", part(spec, 1)) is not None


def test_a_stage_without_experts_is_not_waited_for(workers: Workers) -> None:
    workers.add(b"dense", stage(0, []), None)
    spec = stage(1, [4, 6])
    worker = workers.add(b"routed", spec, None)
    assert workers.are_complete
    assert workers.is_first(worker)
    rows = workers.end(worker, "a", part(spec, 2))
    assert rows is not None
    assert rows.layers == [4, 6]


@pytest.mark.parametrize("order", [1, -1])
def test_a_row_is_as_its_weakest_stage_has_it(order: int) -> None:
    first, second = part(stage(0, [1, 3]), 4), part(stage(1, [4, 6]), 4)
    first.source[:] = [Source.COMPUTED, Source.CACHED, Source.RECALLED, Source.RECALLED]
    second.source[:] = [Source.CACHED, Source.RECALLED, Source.RECALLED, Source.MISSING]
    rows = merged_rows([first, second][::order])
    np.testing.assert_array_equal(rows.source, second.source, strict=True)


@pytest.mark.parametrize("order", [1, -1])
def test_a_row_that_stages_computed_by_different_weights_is_mixed(order: int) -> None:
    first, second = part(stage(0, [1, 3]), 4), part(stage(1, [4, 6]), 5)
    first.weights_version[:] = [0, 0, 1, MIXED]
    second.weights_version[:] = [0, 1, 1, 1, 1]
    rows = merged_rows([first, second][::order])
    assert rows.weights_version[:4].tolist() == [0, MIXED, 1, MIXED]


def told(process: Process, *numbers: int) -> tuple[CaptureSpec, WorkerState, Process]:
    (next_step, weights_version) = numbers
    state = WorkerState(next_step=next_step, ongoing=[], ended=[], weights_version=weights_version)
    return make_spec(), state, process


def test_a_worker_that_comes_again_goes_on_with_its_number(workers: Workers) -> None:
    here = Process.current()
    worker = workers.add(b"first", *told(here, 3, 2))
    assert workers.weights_version == 2
    worker.apply(make_step(3, weights_version=3))
    worker.apply(make_step(4, weights_version=MIXED))
    worker.apply(make_step(5))  # a step without rows need not tell
    assert workers.weights_version == 3
    assert workers.add(b"again", *told(here, 9, 5)).weights_version == 5


def test_the_numbers_of_another_process_go_on_behind_those_of_the_one_before(
    workers: Workers,
) -> None:
    here = Process.current()
    other = dataclasses.replace(here, pid=here.pid + 1)
    workers.add(b"first", *told(here, 3, 2))
    worker = workers.add(b"other", *told(other, 0, 0))
    assert workers.weights_version == 3
    worker.apply(make_step(0, [(0, 0, 2)], admitted=[admit(0, "a", 4, [1])]))
    worker.apply(make_step(1, [(0, 2, 1)], weights_version=1))
    (((_, rows),), _) = worker.apply(make_step(2, finished=[0]))
    assert rows.weights_version.tolist() == [3, 3, 4]
    assert workers.add(b"again", *told(other, 3, 1)).weights_version == 4


def test_engines_share_the_memory_of_prefixes(clock: Clock) -> None:
    workers = Workers(clock, prefix_bytes=2**20)
    spec = make_spec(engine=0, num_engines=2)
    worker = workers.add(b"one", spec, None)
    version = np.zeros(spec.block_size, np.int32)
    rows = RowsOfBlock(*make_rows(0, spec.block_size, spec), version)
    for number in range(2**16):
        worker.prefixes.put(str(number), rows)
    assert 2**19 - 100 < worker.prefixes.size_bytes <= 2**19
    assert workers.size_bytes == worker.prefixes.size_bytes


def test_a_row_that_one_stage_lacks_is_missing(workers: Workers) -> None:
    first, second = stage(0, [1, 3]), stage(1, [4, 6])
    rows = merged_rows([part(first, 4, {1: "queue_full"}), part(second, 3, {2: "paused"})])
    assert rows.source.tolist() == [Source.COMPUTED] + [Source.MISSING] * 3
    assert rows.cause.tolist() == [
        FILLED,
        *(CAUSES[n] for n in ("queue_full", "paused", "unknown")),
    ]
    assert rows.topk_ids.shape == (4, 4, 2)


def test_a_stage_that_never_tells_costs_its_rows_and_not_the_trace(
    workers: Workers, clock: Clock
) -> None:
    first, second = stage(0, [1, 3]), stage(1, [4, 6])
    worker = workers.add(b"first", first, None)
    workers.add(b"second", second, None)
    assert workers.end(worker, "a", part(first, 2)) is None
    clock.now_s = STAGE_TIMEOUT_S - 1
    assert list(workers.overdue()) == []
    clock.now_s = STAGE_TIMEOUT_S
    ((internal_id, rows),) = workers.overdue()
    assert internal_id == "a"
    assert rows.layers == [1, 3, 4, 6]
    assert (rows.source == Source.MISSING).all()
    assert list(workers.overdue()) == []


def test_a_worker_that_comes_again_takes_its_own_place(workers: Workers) -> None:
    spec = make_spec()
    before = workers.add(b"one", spec, None)
    before.gaps = 2
    workers.add(b"two", spec, None)
    assert list(workers) == [b"two"]
    assert workers.get(b"one") is None
    assert workers.num_gaps == 2


def test_a_second_worker_that_runs_is_a_rival_and_none_that_has_ended(workers: Workers) -> None:
    me = Process.current()
    gone = dataclasses.replace(me, start_ticks=1)
    parent = dataclasses.replace(me, pid=os.getppid())
    spec = make_spec()
    assert workers.rival(spec, me) is None
    workers.add(b"gone", spec, None, gone)
    assert workers.rival(spec, me) is None
    workers.add(b"one", spec, None, me)
    assert workers.rival(spec, me) is None  # it comes again
    for other in (parent, gone, None):
        assert workers.rival(spec, other) == me
    assert workers.rival(make_spec(engine=1), parent) is None
    workers.add(b"again", spec, None, me)
    assert workers.rival(spec, parent) == me
