"""The log that the collector writes, line by line."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from builders import Bench, make_hello

from moescope_service.collector.routes_log import _MAX_WAITING, RoutesLog

FULL = Path("/dev/full")


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
    assert [(r["req_id"], r.get("index"), r["token_idx"], r["layer"]) for r in routes] == [
        *(("a", None, position, 1) for position in range(5)),
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
    bench = Bench(make_hello(num_stages=2, layers=[1]), log=path, log_layers=(1, layer))
    assert bench.answered("info").values["refusal"] is None  # who knows what the other one has
    bench.hello = make_hello(num_stages=2, stage=1, layers=[3])
    bench.say_hello(b"second")
    refusal = bench.answered("info").values["refusal"]
    if is_there:
        assert refusal is None
    else:
        assert refusal.startswith("--routes-log-layers (VLLM_LOG_MOE_LAYER) names layer 2, which")
        assert refusal.endswith("layers with experts: 1, 3")
    bench.collector.close()
    assert len(lines(path)) == is_there


def test_a_refused_log_holds_up_nobody(tmp_path):
    bench = Bench(log=tmp_path / "routes.jsonl", log_layers=(2,))
    for number in range(_MAX_WAITING + 10):
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


def test_a_log_without_hello_is_empty_and_closes(tmp_path):
    log = RoutesLog(tmp_path / "routes.jsonl", None)
    log.close()
    assert (tmp_path / "routes.jsonl").read_bytes() == b""


def test_a_log_that_cannot_be_opened(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        RoutesLog(tmp_path / "missing" / "routes.jsonl", None)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_a_full_disk_ends_the_log_and_nothing_else(capfd):
    """The meta line is the first that finds no room; more traces follow than the queue holds."""
    bench = Bench(log=FULL)
    for number in range(_MAX_WAITING + 10):
        bench.run(f"{number}")
    assert bench.status("0") == bench.status(f"{number}") == "finished"
    bench.collector.close()
    assert capfd.readouterr().err.count("the route log ends here") == 1


def test_half_a_line_of_a_killed_collector_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "routes.jsonl"
    path.write_bytes(b'{"type":"meta"}\n{"type":"rou')
    bench = Bench(log=path)
    bench.run("a")
    bench.collector.close()
    whole, torn, *rest = path.read_bytes().splitlines()
    assert (whole, torn) == (b'{"type":"meta"}', b'{"type":"rou')
    assert [orjson.loads(line)["type"] for line in rest] == ["meta"] + ["route"] * 5
