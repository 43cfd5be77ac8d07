"""A signal has some steps of a worker timed, and then some profiled."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
import torch

from benchmarks.gpu import timeline
from benchmarks.gpu.timeline import SKIPPED, STEPS


class Profiler:
    """What stands in for torch's, whose start takes seconds."""

    def __init__(self):
        self.steps = None

    def start(self):
        self.steps = 0

    def stop(self):
        self.whole = self.steps

    def export_chrome_trace(self, path):
        Path(path).write_text(str(self.whole))


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A worker of this process: what it holds, and a function that makes steps."""
    before = signal.getsignal(signal.SIGUSR1)
    profiler = Profiler()
    monkeypatch.setattr(torch.profiler, "profile", lambda: profiler)

    def execute_model():
        if profiler.steps is not None:
            profiler.steps += 1

    recorder = SimpleNamespace(
        record_step=lambda: None,
        _read_batch=lambda: None,
        _link=SimpleNamespace(put=lambda: True),
    )
    runner = SimpleNamespace(execute_model=execute_model)
    capture = SimpleNamespace(
        _recorder=recorder, _runner=runner, _sink=SimpleNamespace(take=lambda: None)
    )
    timeline.Steps(tmp_path).wrap(capture)

    def steps(count):
        for _ in range(count):
            runner.execute_model()
            recorder.record_step()
            recorder._link.put()

    yield steps
    signal.signal(signal.SIGUSR1, before)


def test_steps_are_timed_and_then_profiled(worker, tmp_path):
    assert (tmp_path / "pid").read_text() == str(os.getpid())
    worker(10)
    for number in (0, 1):  # it can be asked for again
        os.kill(os.getpid(), signal.SIGUSR1)
        worker(SKIPPED + 2 * STEPS)
        assert not (tmp_path / f"{number}.times").exists()
        worker(5)
        times = orjson.loads((tmp_path / f"{number}.times").read_bytes())
        assert {name: len(values) for name, values in times.items()} == dict.fromkeys(
            ("whole", "whole_on_core", "put", "put_on_core"), STEPS
        )
        assert (tmp_path / f"{number}.trace").read_text() == str(STEPS)
