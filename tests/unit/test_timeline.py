"""What a trace of torch's profiler says of the packing kernel."""

from __future__ import annotations

import pytest

from benchmarks.gpu import timeline


def event(name, ts, dur, *, cat="kernel", correlation=0, ph="X", stream=7):
    return {
        "ph": ph, "cat": cat, "name": name, "ts": ts, "dur": dur,
        "args": {"correlation": correlation, "stream": stream},
    }  # fmt: skip


def step(at, number):
    """A step of two kernels with the packing between, and the host's calls; out of order."""
    return [
        event("sample", at + 120.0, 10.0),
        event("experts", at, 100.0),
        event("pack_rows", at + 103.0, 5.0 + number, correlation=number),
        event("cuLaunchKernelEx", at + 20.0, 7.0, cat="cuda_driver", correlation=number),
        event("cudaGraphLaunch", at - 30.0, 50.0, cat="cuda_runtime", correlation=100 + number),
        event("aten::add", at, 500.0, cat="cpu_op"),
        event("Memcpy DtoH", at + 101.0, 9.0, cat="gpu_memcpy", stream=13),
        event("pack_rows", at, 0.0, ph="M"),
    ]


def test_a_kernel_is_found_among_its_neighbors():
    events = [one for number in (1, 2, 3) for one in step(1000.0 * number, number)]
    events = [one for one in events if one["ts"] != 3120.0]  # the trace ends with the last packing
    found = timeline.summarize({"whole": [30.0, 10.0, 20.0]}, events)
    assert found["host"] == {"whole": {"median": 20.0, "mean": 20.0, "max": 30.0}}
    gpu = found["gpu"]
    assert gpu["kernel"] == {"median": 7.0, "mean": 7.0, "max": 8.0}
    assert gpu["rest_before"]["median"] == pytest.approx(3.0)
    assert gpu["rest_after"]["median"] == pytest.approx(120.0 - 103.0 - 6.5)
    assert gpu["launch"] == {"median": 7.0, "mean": 7.0, "max": 7.0}
    assert gpu["period"]["median"] == pytest.approx(1000.0)


def test_a_trace_without_the_kernel_says_nothing_of_it():
    found = timeline.summarize({}, [event("experts", 0.0, 1.0)])
    assert found["gpu"] == {}
