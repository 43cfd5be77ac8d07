"""``/routes`` over HTTP, with the real client and without."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gzip
import io

import numpy as np
import orjson
import pyarrow as pa
import pytest
from pyarrow import parquet
from vllm.lora.request import LoRARequest
from vllm.utils.serial_utils import numpy2base64

import moescope
from moescope import errors, formats
from moescope.trace import Source
from tests.waiting import wait_until

from .deployment import Deployment
from .fake_engine import OUTPUT, PROMPT, rows_of

NUM_ROWS = len(PROMPT) + len(OUTPUT) - 1


def test_right_after_the_response_the_client_gets_the_whole_trace(deployment, client):
    assert deployment.complete("first").json()["id"] == "cmpl-first"
    (trace,) = client.routes("cmpl-first")
    assert (trace.request_id, trace.index, trace.model) == ("cmpl-first", 0, "tiny")
    assert (trace.complete, trace.coverage, trace.num_rows) == (True, 1.0, NUM_ROWS)
    assert (trace.finish_reason, trace.prompt_len, trace.cached_len) == ("stop", len(PROMPT), 0)
    assert trace.token_ids.tolist() == PROMPT + OUTPUT
    ids, weights = rows_of(0, NUM_ROWS)
    np.testing.assert_array_equal(trace.topk_ids, ids)
    np.testing.assert_array_equal(trace.topk_weights, weights)


@pytest.mark.parametrize("request_id", ["a/b", "a b", "ü%2F?#", "../x", "pause", "a//b/"])
def test_ids_of_every_kind(deployment, client, request_id):
    header = {"X-Request-Id": request_id} if request_id.isascii() else None
    response_id = deployment.complete(request_id, header).json()["id"]
    found = client.routes(response_id)
    assert found[0].request_id == f"cmpl-{request_id}"
    if header:
        assert client.routes(request_id)[0].request_id == f"cmpl-{request_id}"


def test_every_choice_of_every_prompt(deployment, client):
    deployment.complete("many", n=2, prompts=2)
    assert [trace.index for trace in client.routes("cmpl-many")] == [0, 1, 2, 3]
    assert [trace.index for trace in client.routes("cmpl-many", index=2)] == [2]
    assert [trace.index for trace in client.routes("cmpl-many-1")] == [2, 3]


def test_a_repeated_id_finds_both_newest_first(deployment, client):
    for _ in range(2):
        deployment.complete("", {"X-Request-Id": "again"})
    first, second = client.routes("again")
    assert first.created_s > second.created_s


@pytest.fixture
def truncated(deployment, monkeypatch):
    """A request of whose id the collector says that it left older ones out."""
    deployment.complete("truncated")
    collector = deployment.app.state.moescope_collector
    ask = collector.ask

    async def ask_and_say(op, **values):
        reply = await ask(op, **values)
        return dataclasses.replace(reply, values={**reply.values, "truncated": True})

    monkeypatch.setattr(collector, "ask", ask_and_say)


@pytest.mark.usefixtures("truncated")
def test_every_format_says_where_older_requests_are_left_out(deployment, client):
    def get(form, **params):
        params["format"] = form
        return deployment.http.get("/routes/cmpl-truncated", params=params)

    assert get("json").json()["truncated"] is True
    assert orjson.loads(get("jsonl").content.splitlines()[0])["truncated"] is True
    assert formats.read_npz(get("npz", weights=False).content)["truncated"]
    table = pa.ipc.open_stream(get("arrow").content).read_all()
    assert orjson.loads(table.schema.metadata[b"moescope"])["truncated"] is True
    table = parquet.read_table(io.BytesIO(get("parquet").content))
    assert orjson.loads(table.schema.metadata[b"moescope"])["truncated"] is True
    assert get("npy").status_code == 422
    assert "[0] and older ones" in get("npy").json()["error"]["message"]
    assert client.routes_batch(["cmpl-truncated"]).truncated == {"cmpl-truncated"}


def test_nothing_is_said_where_nothing_is_left_out(deployment):
    deployment.complete("whole")
    assert "truncated" not in deployment.http.get("/routes/cmpl-whole").json()
    body = deployment.http.get("/routes/cmpl-whole?format=npz").content
    assert "truncated" not in formats.read_npz(body)


@pytest.mark.parametrize("stream", [False, True])
def test_the_header_that_the_server_chose_finds_the_request(deployment, client, stream):
    """A stream's response starts before its request reaches the engine."""
    answer = deployment.complete(f"chosen-{stream}", stream=stream)
    alias = answer.headers["X-Request-Id"]
    assert client.routes(alias)[0].request_id == f"cmpl-chosen-{stream}"


@pytest.fixture(scope="module")
def formats_request(deployment):
    deployment.complete("formats", n=2)


@pytest.mark.usefixtures("formats_request")
class TestFormats:
    def get(self, deployment, **params):
        answer = deployment.http.get("/routes/cmpl-formats", params=params)
        assert answer.status_code == 200, answer.text
        return answer

    def test_json(self, deployment):
        answer = self.get(deployment)
        assert answer.headers["content-type"] == "application/json"
        body = answer.json()
        assert body["request_id"] == "cmpl-formats"
        traces = [formats.from_dict(values) for values in body["traces"]]
        assert [(t.index, t.complete, t.num_rows) for t in traces] == [
            (0, True, NUM_ROWS), (1, True, NUM_ROWS),
        ]  # fmt: skip
        assert body["traces"][0]["coverage"] == 1.0
        assert body["traces"][0]["num_hidden_layers"] == 5
        assert set(body["traces"][0]["source"]) == {"computed"}

    def test_jsonl(self, deployment):
        answer = self.get(deployment, format="jsonl")
        meta, *routes = map(orjson.loads, answer.content.splitlines())
        assert (meta["type"], meta["model_id"], meta["top_k"], meta["seed"]) == (
            "meta",
            "tiny",
            2,
            7,
        )
        assert meta["layers_logged"] == [1, 3]
        assert len(routes) == 2 * NUM_ROWS * 2
        assert {r["req_id"] for r in routes} == {"cmpl-formats"}
        assert [r.get("index") for r in routes] == [None] * NUM_ROWS * 2 + [1] * NUM_ROWS * 2

    def test_npz(self, deployment):
        answer = self.get(deployment, format="npz")
        assert answer.headers["content-type"] == "application/x-npz"
        assert [trace.index for trace in formats.load_npz(answer.content)] == [0, 1]
        with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
            assert arrays["topk_ids"].shape == (2 * NUM_ROWS, 2, 2)

    def test_npy_is_vllms_own_routed_experts(self, deployment):
        answer = self.get(deployment, format="npy", index=1)
        assert answer.headers["content-type"] == "application/x-npy"
        expected = np.zeros((NUM_ROWS, 5, 2), np.uint8)
        expected[:, [1, 3]] = rows_of(0, NUM_ROWS)[0]
        assert answer.content == base64.b64decode(numpy2base64(expected))

    @pytest.mark.parametrize("form", ["json", "jsonl", "npz"])
    def test_a_part(self, deployment, form):
        params = {"format": form, "layers": "3", "index": 1, "weights": "false"}
        content = self.get(deployment, **params).content
        if form == "jsonl":
            _, *routes = map(orjson.loads, content.splitlines())
            assert {(r["index"], r["layer"], r["topk_weights"]) for r in routes} == {(1, 3, None)}
            return
        load = (
            formats.load_npz
            if form == "npz"
            else lambda b: [*map(formats.from_dict, orjson.loads(b)["traces"])]
        )
        (trace,) = load(content)
        assert (trace.index, trace.layers.tolist(), trace.topk_weights) == (1, [3], None)
        np.testing.assert_array_equal(trace.topk_ids[:, 0], rows_of(0, NUM_ROWS)[0][:, 1])

    @pytest.mark.parametrize("form", ["json", "jsonl"])
    def test_gzip(self, deployment, form):
        url = f"{deployment.url}/routes/cmpl-formats?format={form}"
        with deployment.http.stream("GET", url, headers={"Accept-Encoding": "gzip"}) as answer:
            raw = b"".join(answer.iter_raw())
        assert answer.headers["content-encoding"] == "gzip"
        plain = deployment.http.get(url, headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert gzip.decompress(raw) == plain.content
        assert all("Accept-Encoding" in one.headers["vary"] for one in (answer, plain))

    @pytest.mark.parametrize("form", ["npz", "arrow", "parquet"])
    def test_arrays_are_not_compressed(self, deployment, form):
        url = f"{deployment.url}/routes/cmpl-formats?format={form}"
        answer = deployment.http.get(url, headers={"Accept-Encoding": "gzip"})
        assert len(answer.content) > 1024
        assert "content-encoding" not in answer.headers

    @pytest.mark.parametrize(
        ("params", "words"),
        [
            ({"layers": "x"}, ["layers", "'x'", "0,5-7"]),
            ({"layers": "3,9"}, ["layers", "9", "1, 3"]),
            ({"layers": ""}, ["layers", "''"]),
            ({"layers": ",".join(["0-9999"] * 9)}, ["layers", "more than 10,000"]),
            ({"layers": "1," * 600}, ["layers", "at most 1000", "1200"]),
            ({"format": "xml"}, ["format", "'xml'", "'json'", "'jsonl'", "'npz'"]),
            ({"index": "2"}, ["index", "[0, 1]", "2"]),
            ({"index": "-1"}, ["index", "-1", "greater"]),
            ({"weights": "maybe"}, ["weights", "'maybe'"]),
            ({"wait_s": "61"}, ["wait_s", "60", "'61'"]),
            ({"format": "npy"}, ["index", "one sequence", "[0, 1]"]),
            ({"format": "npy", "layers": "3", "index": 0}, ["layers", "every layer"]),
            ({"format": "npy", "weights": "true", "index": 0}, ["weights", "ids alone"]),
        ],
    )
    def test_a_bad_parameter(self, deployment, params, words):
        answer = deployment.http.get("/routes/cmpl-formats", params=params)
        assert answer.status_code == 422
        message = answer.json()["error"]["message"]
        assert all(word in message for word in words), message

    def test_the_client_raises_what_it_means(self, client):
        with pytest.raises(errors.InvalidQueryError, match="1, 3"):
            client.routes("cmpl-formats", layers=[9])


def test_unknown(deployment, client):
    answer = deployment.http.get("/routes/no-such/id")
    assert answer.status_code == 404
    assert "'no-such/id'" in answer.json()["error"]["message"]
    assert deployment.http.delete("/routes/no-such/id").status_code == 404
    with pytest.raises(errors.RequestNotFoundError):
        client.routes("no-such/id")


def test_running(deployment, client):
    (name,) = deployment.frontend.add("running-0")
    running = deployment.engine.start(name)
    answer = wait_until(
        lambda: (a := deployment.http.get("/routes/running-0")).status_code != 404 and a, "it runs"
    )
    assert (answer.status_code, answer.json()["status"]) == (202, "running")
    with pytest.raises(errors.StillRunningError):
        client.routes("running-0", wait_s=0.05)
    deployment.frontend.output_processor.abort_requests([name], internal=True)
    deployment.engine.step(finished=[running])


def test_an_aborted_request_is_kept_with_its_true_coverage(deployment, client):
    (name,) = deployment.frontend.add("aborted-0")
    deployment.frontend.output_processor.request_states[name].queue = Queue()
    running = deployment.engine.start(name, PROMPT[:3])
    deployment.frontend.output_processor.abort_requests([name], internal=True)
    deployment.engine.step(finished=[running])
    (trace,) = client.routes("aborted-0", wait_s=5)
    assert (trace.finish_reason, trace.complete, trace.num_rows) == ("abort", False, 4)
    assert trace.source.tolist() == [0, 0, 0, Source.MISSING]
    answer = deployment.http.get("/routes/aborted-0", params={"format": "npy"})
    assert answer.status_code == 409
    assert "coverage 0.750" in answer.json()["error"]["message"]


def test_an_abort_without_a_queue_is_told_as_well(deployment, client):
    """As in `vllm.LLM`, whose output processor hands its outputs over by itself."""
    frontend = deployment.frontend
    names = frontend.add("unqueued", n=2)
    running = [deployment.engine.start(name) for name in names]
    frontend.put(names[0], [21], None)
    assert frontend.output_processor.abort_requests(["unqueued"], internal=False) == names
    deployment.engine.step(finished=running)
    first, second = client.routes("unqueued", wait_s=5)
    assert (first.finish_reason, second.finish_reason) == ("abort", "abort")
    assert (first.token_ids.tolist(), second.token_ids.tolist()) == ([*PROMPT, 21], PROMPT)
    assert (first.complete, second.complete) == (True, True)
    journal = deployment.app.state.moescope_collector._journal
    assert not set(names) & journal._told.keys()
    assert not set(names) & deployment.app.state.moescope_registration._running.keys()


class Queue:
    def put(self, output):
        pass


def test_delete_gives_the_bytes_back(deployment, client):
    client.info()
    deployment.complete("warm-up")
    client.routes("cmpl-warm-up")
    before = client.info().store.bytes
    deployment.complete("deleted", n=2)
    client.routes("cmpl-deleted")
    assert client.info().store.bytes > before
    assert client.delete("cmpl-deleted") == 2
    assert client.info().store.bytes == before
    with pytest.raises(errors.RequestNotFoundError):
        client.routes("cmpl-deleted")


def test_recent_pages(deployment, client):
    for number in range(5):
        deployment.complete(f"page-{number}")
        client.routes(f"cmpl-page-{number}")
    names, before = [], None
    for _ in range(3):
        page = client.recent(limit=2, before=before)
        names += [one.request_id for one in page.sequences]
        before = page.next_before
    assert names[:5] == [f"cmpl-page-{number}" for number in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", "0"), ("limit", "1001"), ("limit", "x"), ("before", "-1"), ("before", str(2**63)),
     ("before", "9" * 25)],
)  # fmt: skip
def test_pages_that_there_are_not(deployment, name, value):
    answer = deployment.http.get("/routes", params={name: value})
    assert answer.status_code == 422
    message = answer.json()["error"]["message"]
    assert message.startswith(f"{name}: ")
    assert f"'{value}'" in message
    assert deployment.http.get("/routes", params={"before": 2**63 - 1}).status_code == 200


def test_a_question_that_cannot_be_asked_leaves_nothing_behind(deployment):
    collector = deployment.app.state.moescope_collector
    with pytest.raises(TypeError):
        asyncio.run(collector.ask("recent", limit=1, before=2**64))
    assert collector._open == {}


@pytest.mark.parametrize(
    ("header", "body", "kept"),
    [
        ({}, {}, True),
        ({"X-Moescope": "off"}, {}, False),
        ({"X-Moescope": "OFF"}, {}, False),
        ({"X-Moescope": "on"}, {}, True),
        ({}, {"xargs": {"moescope": "off"}}, False),
        ({"X-Moescope": "off"}, {"xargs": {"moescope": "on"}}, True),
        ({}, {"xargs": {"other": 1}}, True),
    ],
)
def test_opting_out(deployment, header, body, kept, request):
    name = f"opt-{abs(hash(request.node.name))}"
    deployment.complete(name, header, **body)
    answer = deployment.http.get(f"/routes/cmpl-{name}")
    assert answer.status_code == (200 if kept else 404), answer.text


def test_a_trace_names_its_adapter(deployment, client):
    deployment.frontend.lora = LoRARequest("poet", 1, "/nowhere")
    try:
        deployment.complete("verse", n=2)
    finally:
        deployment.frontend.lora = None
    deployment.complete("prose")
    assert [trace.lora for trace in client.routes("cmpl-verse")] == ["poet", "poet"]
    assert [trace.lora for trace in client.routes("cmpl-prose")] == [None]


def test_a_bad_wish_is_refused(deployment):
    answer = deployment.http.post(
        "/v1/completions", json={"id": "bad"}, headers={"X-Moescope": "maybe"}
    )
    assert answer.status_code == 422
    assert "X-Moescope: 'maybe' is not one of on, off" in answer.json()["error"]["message"]


def test_evicted():
    with Deployment(memory="9k").running() as small, moescope.Client(small.url) as client:
        for number in range(6):
            small.complete(f"e{number}")
            client.routes(f"cmpl-e{number}")
        answer = small.http.get("/routes/cmpl-e0")
        assert answer.status_code == 410
        assert "--routes-memory" in answer.json()["error"]["message"]
        with pytest.raises(errors.TraceEvictedError):
            client.routes("cmpl-e0")
        store = client.info().store
        assert store.evicted > 0
        assert store.bytes <= store.limit_bytes == 9000


def test_opt_in_and_no_token_ids():
    with Deployment(default="off", token_ids="off").running() as quiet:
        quiet.complete("silent")
        quiet.complete("wanted", {"X-Moescope": "on"})
        assert quiet.http.get("/routes/cmpl-silent").status_code == 404
        (trace,) = quiet.http.get("/routes/cmpl-wanted").json()["traces"]
        assert (trace["token_ids"], trace["num_tokens"]) == (None, len(PROMPT) + len(OUTPUT))
        info = quiet.http.get("/moescope/info").json()
        assert (info["routes_default"], info["token_ids"]) == ("off", False)


def test_sampling_keeps_a_share_of_the_requests_that_say_nothing():
    with Deployment(sample="0.3").running() as sampled, moescope.Client(sampled.url) as client:
        names = [f"s{number}" for number in range(100)]
        for name in names:
            sampled.complete(name, n=2, prompts=2)
        sampled.complete("wanted", {"X-Moescope": "on"})
        assert client.routes("cmpl-wanted", wait_s=5)[0].complete  # whatever its id says
        statuses = {name: sampled.http.get(f"/routes/cmpl-{name}").status_code for name in names}
        kept = [name for name, status in statuses.items() if status == 200]
        assert set(statuses.values()) == {200, 404}
        assert 20 <= len(kept) <= 40
        for name in kept:  # all choices of all prompts, or none
            assert len(client.routes(f"cmpl-{name}")) == 4
        again = sampled.complete(kept[0]).json()["id"]  # the id alone decides
        assert len(client.routes(again, wait_s=5)) == 5
        rows = client.experts().num_rows
        assert rows == (100 * 4 + 1 + 1) * NUM_ROWS, "counts are of all traffic"
        assert client.info().routes_sample == 0.3


def test_without_a_default_there_is_nothing_to_sample():
    with Deployment(default="off", sample="1").running() as quiet:
        quiet.complete("silent")
        assert quiet.http.get("/routes/cmpl-silent").status_code == 404
