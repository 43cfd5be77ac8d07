"""Counts-only mode: what a worker counts is what the endpoints and the metrics show."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import moescope
from moescope_service.api.dependencies import settings_of
from moescope_service.capture.counting import CountRecorder, Totals, phase_runs
from moescope_service.capture.cpu.counts import CpuCounts
from moescope_service.capture.cpu.sink import CpuSink
from moescope_service.capture.rows import Batch
from moescope_service.histogram import count_selections
from moescope_service.messages import CaptureSpec
from moescope_service.runtime import collector_address
from moescope_service.settings import Settings
from tests.waiting import scrape, wait_until

from .deployment import Deployment, start_collector
from .fake_engine import SPEC


def step(new: dict[str, int], finished: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=[SimpleNamespace(req_id=n, prompt_len=p) for n, p in new.items()],
        total_num_scheduled_tokens=1,
    )


class Counting:
    """A worker that counts, whose routing the test makes up."""

    def __init__(self, spec: CaptureSpec = SPEC) -> None:
        shape = {"num_layers": 2, "top_k": 2, "id_dtype": "uint8", "weights_dtype": "float16"}
        self.sink = CpuSink(positions=torch.arange(64), **shape)
        self.batch: Batch | None = None
        self.recorder = CountRecorder(
            collector_address(),
            spec,
            sink=CpuCounts(self.sink, 2, 8),
            read_batch=lambda: self.batch,
            report_s=0.02,
        )
        self.want = np.zeros((2, 2, 8), np.int64)
        self._rng = np.random.default_rng(0)

    def step(
        self, rows: dict[str, tuple[int, int]], *, counts: bool = True, **control: Any
    ) -> None:
        """Run a step of sequences with (first position, rows)."""
        lengths = [count for _, count in rows.values()]
        first_row = np.cumsum([0, *lengths]).astype(np.int32)
        positions = np.array([start for start, _ in rows.values()], np.int32)
        self.batch = Batch(list(rows), first_row, positions)
        output = step(**{"new": {}, **control})
        self.recorder.start_step(output)
        ids = self._rng.integers(0, 8, (2, first_row[-1], 2))
        for column in range(2):
            self.sink.write(column, torch.from_numpy(ids[column]), torch.rand(ids[column].shape))
        self.recorder.record_step(output)
        if counts:
            prompt_len = {"a": 5, "b": 3}
            decode = [start >= prompt_len[name] for name, (start, _) in rows.items()]
            by_row = np.repeat(np.array(decode), lengths)
            self.want += count_selections(ids.transpose(1, 0, 2), by_row, 8)


def test_what_a_worker_counts_is_what_the_server_shows() -> None:
    with Deployment(mode="counts").running() as deployment:
        counting = Counting()  # takes the place of the engine, which ships routes
        try:
            with moescope.Client(deployment.url) as client:
                counting.step({"a": (0, 5)}, new={"a": 5})
                counting.step({"a": (5, 1), "b": (0, 2)}, new={"b": 3})
                counting.step({"a": (6, 1), "b": (2, 1)})
                counting.step({"b": (3, 1)}, finished=("a",))

                def shown(phase: str) -> Any:
                    return client.experts(phase).counts

                wait_until(lambda: shown("all").sum() == counting.want.sum(), "the report")
                np.testing.assert_array_equal(shown("prefill"), counting.want[0])
                np.testing.assert_array_equal(shown("decode"), counting.want[1])
                assert client.experts().num_rows == 5 + 3 + 2 + 1
                assert client.info().mode == "counts"

                client.pause()
                wait_until(lambda: not counting.recorder._is_capturing, "the pause")
                counting.step({"b": (4, 1)}, counts=False)
                client.resume()
                wait_until(lambda: counting.recorder._is_capturing, "the end of the pause")
                counting.step({"b": (5, 1)})
                wait_until(lambda: shown("all").sum() == counting.want.sum(), "the report")
            text = scrape(deployment.url)
            assert 'moescope_rows_lost_total{model_name="tiny",reason="paused"} 1.0' in text
            assert 'moescope_steps_total{model_name="tiny"} 6.0' in text
        finally:
            counting.recorder.close()


def test_a_collector_that_comes_again_counts_what_came_since(fresh: Deployment) -> None:
    """Of an idle engine too: where it stood is told at once, and that it was paused."""
    counting = Counting(dataclasses.replace(SPEC, engine=1))
    link = counting.recorder._link
    try:
        with moescope.Client(fresh.url) as client:
            counting.step({"a": (0, 5)}, new={"a": 5})
            wait_until(lambda: client.experts().num_rows == 5, "the report")
            client.pause()
            wait_until(lambda: not counting.recorder._is_capturing, "the pause")
            fresh.kill_collector()
            wait_until(lambda: link.is_away, "the worker notices")
            counting.step({"a": (5, 1)})
            newest = counting.recorder._newest
            wait_until(lambda: counting.recorder._newest is not newest, "a report goes nowhere")
            fresh.collector.stdout.close()
            fresh.collector = start_collector(collector_address(), epoch=1)
            wait_until(lambda: not link.is_away, "they have met")
            wait_until(lambda: fresh.http.get("/experts").status_code == 200, "so have the others")
            assert client.experts().num_rows == 0
            assert client.info().capture == "paused"
            client.resume()
            wait_until(lambda: counting.recorder._is_capturing, "the end of the pause")
            counting.step({"a": (6, 1)})
            wait_until(lambda: client.experts().num_rows, "the report")
            assert client.experts().num_rows == client.experts(window_s=60).num_rows == 1
            assert client.experts("decode").counts.sum() == 4
    finally:
        counting.recorder.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/routes"), ("GET", "/routes/x"), ("DELETE", "/routes/x"), ("POST", "/routes/batch")],
)
def test_there_are_no_routes(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    overrides = deployment.app.dependency_overrides
    monkeypatch.setitem(overrides, settings_of, lambda: Settings(mode="counts"))
    body = {"request_ids": ["x"]} if method == "POST" else None
    answer = httpx.request(method, deployment.url + path, json=body)
    assert answer.status_code == 409
    assert "--routes-mode counts" in answer.json()["error"]["message"]


def test_a_layer_that_does_not_write_is_counted_as_missed() -> None:
    sink = CpuSink(
        positions=torch.arange(8), num_layers=2, top_k=1, id_dtype="uint8", weights_dtype="float16"
    )
    counts = CpuCounts(sink, 2, 4)
    counts.start_step()
    sink.write(0, torch.tensor([[3], [1]]), torch.rand(2, 1))
    counts.count(np.array([0, 2], np.int32), np.array([True]))
    assert counts.totals().rows_missed == 2
    assert not counts.totals().selections.any()
    assert isinstance(counts.totals(), Totals)


def test_a_step_falls_into_stretches_of_one_phase() -> None:
    first_row = np.array([0, 1, 2, 9, 10, 12], np.int32)
    decode = np.array([True, True, False, True, False])
    assert phase_runs(first_row, decode) == [
        (0, 2, True), (2, 7, False), (9, 1, True), (10, 2, False),
    ]  # fmt: skip
    assert phase_runs(np.array([0, 4], np.int32), np.array([False])) == [(0, 4, False)]
