"""The log that the collector writes, line by line."""

from __future__ import annotations

import os
import shutil
import threading

import orjson
import pytest
from builders import Bench, make_spec
from client_fakes import make_trace
from test_log_file import no_more_than

from moescope import formats
from moescope.records import LogInfo
from moescope_service.collector.log_file import LogFile
from moescope_service.collector.routes_log import RoutesLog
from moescope_service.queries import InfoQuery
from tests.waiting import DEADLINE_S, wait_until


def log_of(bench):
    return bench.answered(InfoQuery()).info.log


def lines(path):
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def test_one_line_a_token_of_the_first_layer(tmp_path):
    path = tmp_path / "routes.jsonl"
    bench = Bench(log=path)
    bench.run("a")
    bench.run("b/c", index=1)
    trace = bench.traces("a")[0]
    bench.collector.close()
    meta, *routes = lines(path)
    assert meta == {
        "type": "meta", "model_id": "tiny", "vllm_version": "0.32.0", "torch_version": "2",
        "device": "cpu", "seed": 0, "layers_logged": [1], "top_k": 2,
        "num_experts": 8,
    }  # fmt: skip
    assert [(r["req_id"], r["index"], r["token_idx"], r["layer"]) for r in routes] == [
        *(("a", 0, position, 1) for position in range(5)),
        *(("b/c", 1, position, 1) for position in range(5)),
    ]
    assert [r["topk_ids"] for r in routes[:5]] == trace.topk_ids[:, 0].tolist()
    assert [r["topk_weights"] for r in routes[:5]] == pytest.approx(
        trace.topk_weights[:, 0], abs=1e-3
    )


def test_chosen_layers_and_an_existing_file(tmp_path):
    path = tmp_path / "routes.jsonl"
    path.write_text('{"type":"meta"}\n')
    bench = Bench(log=path, log_layers=(3, 1))
    bench.run("a")
    bench.collector.close()
    _, meta, *routes = lines(path)
    assert meta["layers_logged"] == [3, 1]
    assert [r["layer"] for r in routes] == [3, 1] * 5


@pytest.mark.parametrize(("layer", "is_there"), [(3, True), (2, False)])
def test_a_layer_of_any_stage_is_logged_and_another_is_refused(tmp_path, layer, is_there):
    path = tmp_path / "routes.jsonl"
    bench = Bench(make_spec(num_stages=2, layers=[1]), log=path, log_layers=(1, layer))
    assert bench.answered(InfoQuery()).info.refusal is None  # who knows what the other one has
    bench.spec = make_spec(num_stages=2, stage=1, layers=[3])
    bench.introduce_worker(b"second")
    refusal = bench.answered(InfoQuery()).info.refusal
    if is_there:
        assert refusal is None
    else:
        assert refusal.startswith("--routes-log-layers (VLLM_LOG_MOE_LAYER) names layer 2, which")
        assert refusal.endswith("layers with experts: 1, 3")
    bench.collector.close()
    assert path.exists() == is_there


def test_a_refused_log_holds_up_nobody(tmp_path):
    bench = Bench(log=tmp_path / "routes.jsonl", log_layers=(2,))
    for number in range(300):
        bench.run(f"{number}")
    assert bench.status(f"{number}") == "finished"
    bench.collector.close()


def test_an_opted_out_request_is_not_logged(tmp_path):
    path = tmp_path / "routes.jsonl"
    bench = Bench(log=path)
    bench.run("a", keep=False)
    bench.collector.close()
    assert len(lines(path)) == 1


def test_a_missing_row_is_null(tmp_path):
    path = tmp_path / "routes.jsonl"
    bench = Bench(log=path)
    bench.start("a")
    bench.step([(0, 5, 1)], lost="queue_full")
    bench.finish("a-i", [5, 6, 7])
    bench.end()
    bench.collector.close()
    assert [r["topk_ids"] is None for r in lines(path)[1:]] == [False] * 5 + [True]


def test_a_log_without_introduction_closes(tmp_path):
    log = RoutesLog(LogFile(tmp_path / "routes.jsonl"), None)
    log.close()
    assert log.info == LogInfo(state="ok", dropped=0)


def request_ids(path):
    return list(dict.fromkeys(r["req_id"] for r in lines(path) if r["type"] == "route"))


def test_a_full_disk_costs_nothing_but_time(tmp_path):
    """Traces that end meanwhile wait, and what was half written is whole afterwards."""
    path = tmp_path / "routes.jsonl"
    bench = Bench(log=path)
    bench.run("a")
    wait_until(lambda: path.exists() and request_ids(path) == ["a"], "the log has the first")
    with no_more_than(path.stat().st_size + 100):
        bench.run("b")
        wait_until(lambda: log_of(bench).state == "failing", "the log fails")
        for number in range(10):
            bench.run(f"c{number}")
        assert bench.status("c9") == "finished"
    bench.collector.reopen_log()
    wait_until(lambda: log_of(bench).state == "ok", "the log goes on")
    bench.run("d")
    bench.collector.close()
    assert request_ids(path) == ["a", "b", *(f"c{number}" for number in range(10)), "d"]
    assert len(lines(path)) == 1 + 13 * 5
    assert log_of(bench) == LogInfo(state="ok", dropped=0)


def test_a_disk_that_stays_full_to_the_end_is_counted(tmp_path, caplog):
    path = tmp_path / "routes.jsonl"
    bench = Bench(log=path)
    bench.run("a")
    wait_until(lambda: path.exists() and request_ids(path) == ["a"], "the log has the first")
    with no_more_than(path.stat().st_size):
        bench.run("b")
        bench.run("c")
        bench.collector.close()
    assert log_of(bench) == LogInfo(state="failing", dropped=2)
    assert sum("cannot write the route log" in r.message for r in caplog.records) == 1
    assert "lacks the last 2 traces" in caplog.text


@pytest.mark.parametrize("how", ["moved", "emptied"])
def test_a_log_that_logrotate_took_goes_on(tmp_path, how):
    path, old = tmp_path / "routes.jsonl", tmp_path / "routes.jsonl.1"
    bench = Bench(log=path)
    bench.run("a")
    wait_until(lambda: path.exists() and request_ids(path) == ["a"], "the log has the first")
    if how == "moved":
        path.rename(old)
    else:
        shutil.copyfile(path, old)
        os.truncate(path, 0)
    bench.run("b")
    bench.collector.close()
    for one, name in ((old, "a"), (path, "b")):
        assert request_ids(one) == [name]
        assert lines(one)[0]["type"] == "meta"


def test_a_woken_log_makes_its_file_anew_without_a_trace(tmp_path):
    path = tmp_path / "routes.jsonl"
    bench = Bench(log=path)
    wait_until(path.exists, "the log is begun")
    path.unlink()
    bench.collector.reopen_log()
    wait_until(path.exists, "the log is there again")
    bench.collector.close()
    assert [one["type"] for one in lines(path)] == ["meta"]


class StuckFile:
    """A file on a disk that does not answer until `goes_on` is set."""

    def __init__(self):
        self.goes_on = threading.Event()
        self.pieces = []
        self._lines = b""

    def begin(self, meta):
        pass

    def put(self, lines):
        self._lines = lines

    def flush(self):
        self.goes_on.wait(DEADLINE_S)
        self.pieces.append(self._lines)

    def close(self):
        pass


def begun(file, **arguments):
    log = RoutesLog(file, None, **arguments)
    log.begin(make_spec(layers=[0, 1, 3]))
    return log


def test_a_stuck_disk_holds_up_no_caller(caplog):
    """What finds the queue full is left out, counted and told once."""
    file = StuckFile()
    trace = make_trace()
    log = begun(file, max_waiting_bytes=5 * trace.size_bytes + 20_000)
    for _ in range(1000):
        log.write(trace)
    assert log.info.state == "failing"
    assert 990 <= log.info.dropped < 1000
    assert caplog.text.count("traces are left out of it") == 1
    file.goes_on.set()
    log.close()
    written = b"".join(file.pieces).splitlines()
    assert len(written) == (1000 - log.info.dropped) * trace.num_rows
    assert log.info.state == "ok"


def test_the_end_does_not_wait_for_a_stuck_disk():
    file = StuckFile()
    log = begun(file)
    for _ in range(3):
        log.write(make_trace())
    log.close(timeout_s=0.05)
    assert log.info.dropped == 3
    file.goes_on.set()


def test_a_trace_larger_than_the_queue_is_logged_in_pieces():
    file = StuckFile()
    file.goes_on.set()
    trace = make_trace(num_rows=5000, layers=(0, 1))
    log = begun(file, max_waiting_bytes=1)
    log.write(trace)
    log.close()
    assert b"".join(file.pieces) == b"".join(formats.route_lines(trace.select(layers=[0])))
    assert max(map(len, file.pieces)) < 100_000
    assert log.info.dropped == 0


def test_half_a_line_of_a_killed_collector_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "routes.jsonl"
    path.write_bytes(b'{"type":"meta"}\n{"type":"rou')
    bench = Bench(log=path)
    bench.run("a")
    bench.collector.close()
    whole, torn, *rest = path.read_bytes().splitlines()
    assert (whole, torn) == (b'{"type":"meta"}', b'{"type":"rou')
    assert [orjson.loads(line)["type"] for line in rest] == ["meta"] + ["route"] * 5
