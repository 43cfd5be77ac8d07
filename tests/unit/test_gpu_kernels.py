"""What traces of vLLM's profiler say of the GPU's time by kernel."""

from __future__ import annotations

import itertools

import orjson
import pytest
from stream_server import DONE, chunk, serving, usage

from benchmarks.gpu import kernels
from benchmarks.gpu.loads import Workload
from benchmarks.gpu.throughput import SEED
from moescope import CommandError, FormatError
from moescope.overhead import rounds
from moescope.overhead.arms import Arm
from moescope.overhead.hosting import SideBySide, StartedArms

SMALL = Workload(name="small", num=1, concurrency=1, input_len=3, output_len=1, rounds=1)
TOPK = "void vllm::moe::topkGating<4, (int)60>(float const*, bool)"


def kernel(name, ts, dur, *, cat="kernel"):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def step(at, *, experts_us=50.0):
    """A step of 100 us: two kernels at once, one within another, and two rests; out of order."""
    return [
        kernel("void (anonymous namespace)::experts(int)", at + 20.0, experts_us),
        kernel("_prepare_pos_seq_lens_kernel", at, 10.0),
        kernel(TOPK, at + 60.0, 20.0),
        kernel(TOPK, at + 30.0, 10.0),
        kernel("cudaGraphLaunch", at, 90.0, cat="cuda_runtime"),
        {"ph": "M", "name": "process_name"},
    ]


def test_the_time_of_a_step_is_that_of_its_kernels_and_the_rest():
    late, early = kernel("early", 990.0, 5.0), kernel("late", 1305.0, 5.0)
    events = [late, *step(1100.0), *step(1000.0, experts_us=30.0), early, *step(1200.0)]
    found = kernels.summarize(events)
    assert found["steps"] == 2
    assert found["period"] == pytest.approx(100.0)
    # 10 to 20 and 80 to 100 in both; in the first also 50 to 60.
    assert found["rest"] == pytest.approx(35.0)
    assert list(found["kernels"].items()) == [
        ("experts", {"runs": 1.0, "us": 40.0}),
        ("vllm::moe::topkGating", {"runs": 2.0, "us": 30.0}),
        ("_prepare_pos_seq_lens_kernel", {"runs": 1.0, "us": 10.0}),
    ]


def test_less_than_two_steps_are_refused():
    with pytest.raises(FormatError, match="ran 1 times"):
        kernels.summarize(step(0.0))


def found(period, **us):
    by_name = {name: {"runs": 1.0, "us": each} for name, each in us.items()}
    return {"period": period, "rest": 1.0, "kernels": by_name}


def test_arms_are_compared_by_medians():
    said = kernels.statements({
        "stock": [found(100.0, a=5.0), found(101.0, a=5.0), found(900.0, a=5.0)],
        "moescope": [found(103.0, a=4.0, pack_rows=2.0)] * 2 + [found(103.0, a=4.0, rare=9.0)],
    })  # fmt: skip
    assert list(said) == [
        "stock: a step of 101.0 us",
        "moescope: pack_rows +2.00 us, period +2.00 us, a -1.00 us, rare +0.00 us, rest +0.00 us",
    ]


def test_every_server_is_profiled_in_turn(tmp_path):
    asked = []

    def server(name, period):
        def script(_, body):
            path = script.server.seen[-1].path
            asked.append((name, path))
            if path == "/start_profile":
                steps = [step(number * period) for number in range(3)]
                trace = {"traceEvents": [event for one in steps for event in one]}
                file = tmp_path / f"{body['profile_prefix']}_rank0.1.pt.trace.json"
                file.write_bytes(orjson.dumps(trace))
                assert body["delay_iterations"] + body["max_iterations"] == 120
            if path == "/v1/completions":
                assert body["model"] == "demo"
                return [(0, chunk()), (0, usage(3, 1) + DONE)]
            return [(0, b"{}")]

        return script

    scripts = {"stock": server("stock", 100.0), "stock-again": server("stock-again", 110.0)}
    with serving(scripts["stock"]) as one, serving(scripts["stock-again"]) as two:
        scripts["stock"].server, scripts["stock-again"].server = one, two
        one.pages["/v1/models"] = two.pages["/v1/models"] = orjson.dumps({"data": [{"id": "demo"}]})
        started = StartedArms(
            arms=[Arm(name=name) for name in scripts],
            arrangement=SideBySide({"stock": one.url, "stock-again": two.url}),
        )
        measured = kernels.measure(started, tmp_path, SMALL)
    periods = {name: [one["period"] for one in passes] for name, passes in measured.items()}
    assert periods == {"stock": [100.0] * 3, "stock-again": [110.0] * 3}
    profiled = ["/start_profile", "/v1/completions", "/stop_profile"]
    assert [path for name, path in asked if name == "stock"] == ["/v1/completions", *profiled * 3]
    orders = rounds.shuffled_orders([*scripts], 3, SEED)
    assert [name for name, path in asked if path == "/start_profile"] == [*itertools.chain(*orders)]


def test_a_server_that_is_not_its_arm_is_not_profiled(tmp_path):
    with serving(lambda *_: [(0, b"{}")]) as server:
        started = StartedArms(
            arms=[Arm(name="moescope")], arrangement=SideBySide({"moescope": server.url})
        )
        with pytest.raises(CommandError, match=r"moescope at .* is not what its name says"):
            kernels.measure(started, tmp_path, SMALL)
    assert not server.seen
