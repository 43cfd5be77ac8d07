"""``/metrics``, ``/experts`` and ``/moescope/info``."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from moescope import Client, InvalidQueryError, analysis
from moescope.records import LogInfo, StoreInfo
from moescope_service.api.dependencies import settings_of
from moescope_service.api.metrics import MAX_EXPERT_SERIES, MoescopeMetrics
from moescope_service.metric_names import METRICS
from moescope_service.queries import CollectorInfo, MetricsReply
from moescope_service.settings import Settings
from tests.waiting import scrape, wait_until

from .deployment import Deployment
from .fake_engine import OUTPUT, PROMPT, SPEC, rows_of

NUM_ROWS = len(PROMPT) + len(OUTPUT) - 1
SHOWN = {name for name in METRICS if not name.startswith("moescope_archive_")}
"""Where there is no archive."""
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def samples_in(deployment, accept="text/plain"):
    is_open = accept.startswith("application/openmetrics")
    parse = parse_openmetrics if is_open else parse_text
    families = parse(scrape(deployment.url, accept))
    return [sample for family in families for sample in family.samples]


def ours(samples):
    return [sample for sample in samples if sample.name.startswith("moescope_")]


def value(samples, name, **labels):
    found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
    return sum(found) if found else None


@pytest.fixture(scope="module")
def served(deployment):
    """Two whole requests, one with a lost row, one opted out; and one that runs."""
    for name in ("a", "b"):
        deployment.complete(name)
        assert deployment.http.get(f"/routes/cmpl-{name}").status_code == 200
    deployment.complete("c", {"X-Moescope": "off"})
    (name,) = deployment.frontend.add("lost")
    running = deployment.engine.start(name)
    deployment.engine.step([(running, 1)], hooked=False)
    deployment.frontend.put(name, [1, 2], None)
    deployment.frontend.output_processor.request_states[name].make_request_output(
        [], None, "stop", None
    )
    deployment.engine.step(finished=[running])
    assert deployment.http.get("/routes/lost?wait_s=5").json()["traces"][0]["complete"] is False
    deployment.frontend.add("running")
    wait_until(lambda: value(samples_in(deployment), "moescope_sequences_running") == 1, "one runs")
    return deployment


@pytest.mark.parametrize("accept", ["text/plain", OPENMETRICS])
def test_one_scrape_holds_both_and_the_totals_are_those_of_experts(served, accept):
    samples = samples_in(served, accept)
    assert any(sample.name.startswith(("python_", "process_", "vllm")) for sample in samples)
    assert not [s.name for s in ours(samples) if s.name.endswith("_created")]
    rows = 3 * NUM_ROWS + len(PROMPT)
    assert value(samples, "moescope_collector_up") == 1
    assert value(samples, "moescope_rows_captured_total", model_name="tiny") == rows
    assert value(samples, "moescope_rows_lost_total", reason="hook_missed") == 1
    assert value(samples, "moescope_traces_total", status="complete") == 2
    assert value(samples, "moescope_traces_total", status="incomplete") == 1
    assert value(samples, "moescope_traces_kept") == 3
    assert value(samples, "moescope_capture_on") == 1
    assert value(samples, "moescope_sequences_running") == 1
    assert value(samples, "moescope_steps_total") > 0
    assert value(samples, "moescope_hook_seconds_total") > 0
    for phase, count in (("prefill", 4 * len(PROMPT)), ("decode", rows - 4 * len(PROMPT))):
        assert value(samples, "moescope_rows_total", phase=phase) == count
        assert value(samples, "moescope_window_rows", phase=phase) == count
    assert value(samples, "moescope_trace_rows_total", source="computed") == 2 * NUM_ROWS + 5
    assert value(samples, "moescope_trace_rows_total", source="missing") == 1
    assert value(samples, "moescope_trace_rows_missing_total", cause="hook_missed") == 1
    assert value(samples, "moescope_trace_rows_missing_total") == 1
    assert value(samples, "moescope_traces_incomplete_total", cause="hook_missed") == 1
    assert value(samples, "moescope_traces_incomplete_total") == 1
    assert value(samples, "moescope_experts") == 8
    assert value(samples, "moescope_top_k") == 2
    assert value(samples, "moescope_layers") == 2
    experts = served.http.get("/experts").json()
    assert value(samples, "moescope_expert_tokens_total") == np.sum(experts["counts"]) == rows * 4
    for phase in ("prefill", "decode"):
        counts = served.http.get("/experts", params={"phase": phase}).json()["counts"]
        for column, layer in enumerate(SPEC.layers):
            for expert in range(SPEC.num_experts):
                labels = {"layer": str(layer), "expert": str(expert), "phase": phase}
                found = value(samples, "moescope_expert_tokens_total", **labels)
                assert found == counts[column][expert], labels


def test_every_metric_is_declared_and_every_declared_one_is_shown(served):
    families = parse_openmetrics(scrape(served.url, OPENMETRICS))
    shown = [f for f in families if f.name.startswith("moescope_")]
    assert {family.name for family in shown} == SHOWN
    for family in shown:
        spec = METRICS[family.name]
        assert (family.type, family.documentation) == (spec.kind, spec.help)
        assert family.samples
        for sample in family.samples:
            if spec.kind == "histogram":
                assert sample.name.removeprefix(spec.name) in {"_bucket", "_sum", "_count"}
                assert set(sample.labels) - {"le"} == set(spec.labels)
                continue
            assert (sample.name, set(sample.labels)) == (spec.sample_name, set(spec.labels))


def test_what_steps_read(served):
    """Requests of five prompt tokens and two more, one after the other, and one that is refused."""
    body = served.http.get("/experts", params={"per": "step"}).json()
    assert (body["model"], body["layers"], body["expert_bytes"]) == ("tiny", [1, 3], [600, 700])
    (engine,) = body["engines"]
    found = {(one["kind"], one["min_tokens"]): one for one in engine["steps"]}
    assert found.keys() == {("prefill", 4), ("decode", 1)}
    decode, prefill = found["decode", 1], found["prefill", 4]
    assert (decode["steps"], prefill["steps"]) == (6, 4)
    assert (decode["tokens"], prefill["tokens"]) == (1.0, 5.0)
    assert decode["distinct_experts"] == [2.0, 2.0]
    assert decode["busiest_expert_tokens"] == [1.0, 1.0]
    assert decode["expert_bytes"] == 2 * 600 + 2 * 700
    ids = rows_of(0, 5)[0]
    assert prefill["distinct_experts"] == [len(np.unique(ids[:, layer])) for layer in range(2)]
    samples = samples_in(served)
    labels = {"engine": "0", "kind": "decode"}
    assert value(samples, "moescope_step_experts_count", **labels) == 6 * 2
    assert value(samples, "moescope_step_experts_sum", **labels) == 6 * 2 * 2
    assert value(samples, "moescope_step_experts_bucket", **labels, le="1.0") == 0
    assert value(samples, "moescope_step_experts_bucket", **labels, le="2.0") == 6 * 2
    assert value(samples, "moescope_step_tokens_sum", **labels) == 6
    assert value(samples, "moescope_step_tokens_bucket", **labels, le="1.0") == 6
    assert value(samples, "moescope_step_expert_bytes_total", **labels) == 6 * 2 * 1300
    prefill_labels = {"engine": "0", "kind": "prefill"}
    assert value(samples, "moescope_step_tokens_bucket", **prefill_labels, le="3.0") == 0
    assert value(samples, "moescope_step_tokens_bucket", **prefill_labels, le="7.0") == 4


@pytest.mark.parametrize("other", ["phase=all", "format=json", "window_s=60"])
def test_steps_take_no_other_parameter(served, other):
    answer = served.http.get(f"/experts?per=step&{other}")
    assert answer.status_code == 422
    assert other.partition("=")[0] in answer.json()["error"]["message"]


def test_experts(served):
    body = served.http.get("/experts").json()
    assert (body["model"], body["phase"], body["layers"]) == ("tiny", "all", [1, 3])
    assert body["num_rows"] == 3 * NUM_ROWS + len(PROMPT)
    assert np.shape(body["counts"]) == (2, 8)
    for name in ("entropy", "normalized_entropy", "max_violation", "active_experts", "top_experts"):
        assert len(body[name]) == 2
    assert body["max_entropy_bits"] == 3.0  # log2 of 8 experts
    bits = analysis.entropy_bits(np.array(body["counts"]))
    assert body["entropy_bits"] == pytest.approx(bits.tolist())
    assert body["entropy"] == pytest.approx((bits * np.log(2)).tolist())
    assert body["normalized_entropy"] == pytest.approx((bits / 3).tolist())
    split = [served.http.get("/experts", params={"phase": p}).json() for p in ("prefill", "decode")]
    assert sum(one["num_rows"] for one in split) == body["num_rows"]
    np.testing.assert_array_equal(sum(np.array(one["counts"]) for one in split), body["counts"])
    answer = served.http.get("/experts", params={"format": "npz", "phase": "decode"})
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["counts"], split[1]["counts"])
        assert arrays["layers"].tolist() == [1, 3]
    window = served.http.get("/experts", params={"window_s": 600}).json()
    assert window["counts"] == body["counts"]
    assert 0 < window["window_s"] < 600
    bad = [
        ({"phase": "x"}, "'prefill'"),
        ({"format": "xml"}, "'npz'"),
        ({"window_s": 3601}, "3600"),
        ({"window_s": 0}, "greater than 0"),
    ]
    for params, words in bad:
        answer = served.http.get("/experts", params=params)
        assert answer.status_code == 422
        assert words in answer.json()["error"]["message"]


def test_the_client_reads_experts_and_info(served, client):
    counts = client.experts("decode")
    assert (counts.phase, counts.counts.shape, counts.window_s) == ("decode", (2, 8), None)
    assert 0 < client.experts(window_s=600.0).window_s < 600
    info = client.info()
    assert (info.model, info.layers, info.num_experts, info.top_k) == ("tiny", (1, 3), 8, 2)
    assert (info.router_types, info.seed, info.capture) == (("CPURouter",), 7, "on")
    assert info.store.limit_bytes == 2**30


def test_a_window_longer_than_a_big_model_keeps_is_refused():
    """58 layers of 256 experts, as DeepSeek-V3 has them: 64 MiB are 282 marks, 281 slices."""
    spec = dataclasses.replace(SPEC, layers=list(range(3, 61)), num_experts=256, num_blocks=8)
    with Deployment(spec=spec).running() as deployment, Client(deployment.url) as client:
        wait_until(lambda: spec.model in scrape(deployment.url), "the worker introduced itself")
        assert client.experts(window_s=2810.0).window_s < 60.0
        with pytest.raises(InvalidQueryError, match=r"invalid window_s 2810\.5"):
            client.experts(window_s=2810.5)


def test_reset_leaves_the_prometheus_counters_alone(served, client):
    before = value(samples_in(served), "moescope_expert_tokens_total")
    since_s = client.reset()
    counts = client.experts()
    assert (counts.num_rows, counts.counts.sum(), counts.since_s) == (0, 0, since_s)
    body = served.http.get("/experts").json()
    assert body["entropy"] == body["entropy_bits"] == [None, None]
    assert value(samples_in(served), "moescope_expert_tokens_total") == before


def test_pause_and_resume(served, client):
    try:
        assert client.pause() == "paused"
        assert client.info().capture == "paused"
        assert value(samples_in(served), "moescope_capture_on") == 0
        recorder = served.engine.recorder
        wait_until(lambda: not recorder._is_capturing, "the worker pauses")
        served.complete("paused")
        (trace,) = client.routes("cmpl-paused")
        assert (trace.complete, trace.coverage) == (False, 0.0)
        assert value(samples_in(served), "moescope_rows_lost_total", reason="paused") == NUM_ROWS
    finally:
        assert client.resume() == "on"
    wait_until(lambda: recorder._is_capturing, "the worker goes on")
    served.complete("resumed")
    assert client.routes("cmpl-resumed")[0].complete


def test_openapi_lists_every_endpoint(deployment):
    paths = deployment.http.get("/openapi.json").json()["paths"]
    listed = {(path, method) for path, methods in paths.items() for method in methods}
    assert listed >= {
        ("/routes", "get"), ("/routes/{request_id}", "get"), ("/routes/{request_id}", "delete"),
        ("/routes/batch", "post"), ("/routes/pause", "post"), ("/routes/resume", "post"),
        ("/routes/reset", "post"), ("/routes/weights", "get"), ("/routes/weights", "post"),
        ("/routes/{request_id}/stream", "get"),
        ("/experts", "get"), ("/moescope/info", "get"), ("/metrics", "get"),
    }  # fmt: skip
    one = paths["/routes/{request_id}"]["get"]
    assert {p["name"] for p in one["parameters"]} == {
        "request_id", "format", "layers", "index", "weights", "wait_s", "start", "limit", "dtype",
        "fill", "weights_version", "max_staleness", "tokens",
    }  # fmt: skip
    assert one["responses"].keys() >= {"200", "202", "404", "409", "410", "422", "501", "503"}
    assert len(one["responses"]["200"]["content"]) == 6
    assert all(p.get("description") for p in one["parameters"])
    batch = paths["/routes/batch"]["post"]
    assert batch["responses"]["200"]["content"].keys() == {
        "application/json", "application/x-npz", "application/vnd.apache.arrow.stream",
        "application/vnd.apache.parquet",
    }  # fmt: skip


def families(num_layers=2, num_experts=8, window=None, expert_metrics="auto"):
    """What a scrape shows of a model: families by name."""
    spec = dataclasses.replace(
        SPEC, model="m", layers=list(range(num_layers)), num_experts=num_experts
    )
    shape = (2, num_layers, num_experts)
    window = np.ones(shape, np.int64) if window is None else window
    info = CollectorInfo(
        spec=spec, workers_complete=True, refusal=None, capture="on", started_s=0.0, epoch=0,
        store=StoreInfo(limit_bytes=1, bytes=0, traces=0, evicted=0),
        log=LogInfo(state="off", dropped=0), weights_version=0,
    )  # fmt: skip
    registry = CollectorRegistry()
    arrays = [np.zeros(shape, np.int64).tobytes(), window.tobytes()]
    reply = MetricsReply(info=info, rows=[0, 0], window_rows=[0, 0], arrays=arrays)
    registry.register(MoescopeMetrics(reply, expert_metrics))
    return {family.name: family for family in registry.collect()}


def test_too_many_experts_are_absent_not_coarser():
    experts = "moescope_expert_tokens"
    assert set(families(num_experts=MAX_EXPERT_SERIES // 2)) == SHOWN
    assert set(families(num_experts=MAX_EXPERT_SERIES // 2 + 1)) == SHOWN - {experts}
    assert experts in families(num_experts=MAX_EXPERT_SERIES, expert_metrics="on")
    assert experts not in families(expert_metrics="off")


def test_a_big_model_shows_few_series():
    """58 layers of 256 experts, as DeepSeek-V3 has them."""
    shown = families(num_layers=58, num_experts=256)
    assert sum(len(family.samples) for family in shown.values()) <= 2000


def samples_of(family):
    return {tuple(s.labels.values())[1:]: s.value for s in family.samples}


def test_the_balance_of_the_window():
    window = np.zeros((2, 2, 4), np.int64)
    window[0, 0] = [4, 4, 4, 4]
    window[1, 0] = [6, 0, 2, 0]
    shown = families(num_experts=4, window=window)
    layer = {name.removeprefix("moescope_layer_"): samples_of(f) for name, f in shown.items()}
    assert layer["normalized_entropy"] == {
        ("0", "prefill"): pytest.approx(1.0),
        ("0", "decode"): pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)),
    }
    assert layer["max_violation"] == {("0", "prefill"): 0.0, ("0", "decode"): 2.0}
    assert layer["max_mean_load_ratio"] == {("0", "prefill"): 1.0, ("0", "decode"): 3.0}
    assert layer["active_experts"] == {("0", "prefill"): 4.0, ("0", "decode"): 2.0}
    assert (layer["hottest_expert"], layer["hottest_expert_share"]) == (
        {("0",): 0.0},
        {("0",): 10 / 24},
    )
    assert (layer["coldest_expert"], layer["coldest_expert_share"]) == (
        {("0",): 1.0},
        {("0",): 4 / 24},
    )


def test_a_window_without_traffic_shows_no_balance():
    shown = families(window=np.zeros((2, 2, 8), np.int64))
    assert not [name for name, f in shown.items() if "_layer_" in name and f.samples]


def test_a_server_that_shows_no_experts(monkeypatch, deployment, served):
    overrides = deployment.app.dependency_overrides
    monkeypatch.setitem(overrides, settings_of, lambda: Settings(expert_metrics="off"))
    names = {sample.name for sample in ours(samples_in(served))}
    assert "moescope_expert_tokens_total" not in names
    assert "moescope_layer_active_experts" in names
