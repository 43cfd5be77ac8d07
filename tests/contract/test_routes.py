"""``/routes`` over HTTP, with the real client and without."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, FinishReason

import moescope
from moescope import errors
from moescope.trace import Source
from moescope_service.queries import RecentQuery
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


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_header_is_found_as_its_client_knows_it(deployment, client, encoding, stream):
    own = f"zürich-{encoding}-{stream}"
    answer = deployment.complete("", {"X-Request-Id": own.encode(encoding)}, stream=stream)
    seen = f"cmpl-{own.encode(encoding).decode('latin-1')}"  # what the response says
    if not stream:
        assert answer.json()["id"] == seen
    for one in (own, f"cmpl-{own}", seen):
        assert client.routes(one)[0].request_id == seen


def test_bytes_that_are_no_utf_8_are_found_as_latin_1(deployment, client):
    deployment.complete("", {"X-Request-Id": b"caf\xe9"})
    assert client.routes("café")[0].request_id == "cmpl-café"


@pytest.mark.parametrize("own", ["mine", "zürich-7", "a/b/", "m" * 600])
@pytest.mark.parametrize("has_header", [False, True])
def test_the_request_id_of_a_body_finds_the_request(deployment, client, own, has_header):
    own = f"{has_header}-{own}"
    header = {"X-Request-Id": f"header-{own}".encode()} if has_header else {}
    body = {"prompt": 'a "request_id" in a prompt', "id": f"with-{own}"}
    for more in ({}, {"request_id": own}):
        post = deployment.http.post("/v1/completions", json={**body, **more}, headers=header)
        assert post.status_code == 200
    (trace,) = client.routes(own)
    newest, older = client.routes(post.json()["id"])
    assert trace.created_s == newest.created_s > older.created_s


@pytest.mark.parametrize("request_id", ["7", "[]", "null", '"\\ud800"'])
def test_a_request_id_that_is_none_is_left_out(deployment, client, request_id):
    content = f'{{"id": "odd-{len(request_id)}", "request_id": {request_id}}}'.encode()
    headers = {"Content-Type": "application/json"}
    answer = deployment.http.post("/v1/completions", content=content, headers=headers)
    assert len(client.routes(answer.json()["id"])) == 1


def test_a_slash_at_the_end_of_a_path_is_no_part_of_an_id_unless_it_is(deployment, client):
    for own in ("slashed", "both", "both/"):
        deployment.complete("", {"X-Request-Id": own})
    get = deployment.http.get
    assert get("/routes/slashed/").json()["request_id"] == "slashed"
    assert get("/routes/cmpl-slashed/", params={"format": "npy"}).status_code == 200
    assert get("/routes/both/").json()["traces"][0]["request_id"] == "cmpl-both/"
    assert get("/routes/both").json()["traces"][0]["request_id"] == "cmpl-both"
    assert get("/routes/slashed//").status_code == 404
    assert deployment.http.delete("/routes/both/").json() == {"request_id": "both/", "deleted": 1}
    assert deployment.http.delete("/routes/both/").json() == {"request_id": "both", "deleted": 1}
    assert get("/routes/both/").status_code == 404
    (name,) = deployment.frontend.add("slow-0")
    running = deployment.engine.start(name)
    answer = wait_until(
        lambda: (a := get("/routes/slow-0/")).status_code != 404 and a, "it is registered"
    )
    assert (answer.status_code, answer.json()["request_id"]) == (202, "slow-0")
    deployment.frontend.output_processor.abort_requests([name], internal=True)
    deployment.engine.step(finished=[running])


def test_other_paths_with_a_slash_at_the_end(deployment):
    for path in ("/experts/", "/moescope/info/", "/metrics/"):
        answer = deployment.http.get(path, follow_redirects=True)
        assert answer.status_code == 200, path
    listed = [deployment.http.get(path).json()["sequences"] for path in ("/routes", "/routes/")]
    assert listed[0]
    assert [one["request_id"] for one in listed[0]] == [one["request_id"] for one in listed[1]]


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


@pytest.mark.parametrize("stream", [False, True])
def test_the_header_that_the_server_chose_finds_the_request(deployment, client, stream):
    """A stream's response starts before its request reaches the engine."""
    answer = deployment.complete(f"chosen-{stream}", stream=stream)
    alias = answer.headers["X-Request-Id"]
    assert client.routes(alias)[0].request_id == f"cmpl-chosen-{stream}"


def test_unknown(deployment, client):
    answer = deployment.http.get("/routes/no-such/id")
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    for part in ("'no-such/id'", "LangChain shows lc_run--…", "LiteLLM resp_", "X-Request-Id"):
        assert part in message
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
    journal = deployment.app.state.moescope_collector._outbox.journal
    assert not any(name in journal for name in names)
    assert not set(names) & deployment.app.state.moescope_registration._running.keys()


class Queue:
    def put(self, output):
        pass


def not_routed(deployment):
    text = deployment.http.get("/metrics").text
    line = r'moescope_trace_rows_missing_total\{cause="not_routed",model_name="tiny"\} (\S+)'
    return float(re.search(line, text)[1])


@pytest.mark.parametrize("is_rejected", [False, True])
def test_an_end_without_an_output_is_told(is_rejected, deployment, client):
    """A paused engine of vLLM 0.33 rejects requests on arrival: nothing runs, nothing is output."""
    processor, name = deployment.frontend.output_processor, f"rejected-{is_rejected}"
    before = not_routed(deployment)
    (internal_id,) = deployment.frontend.add(name)
    state = processor.request_states[internal_id]
    state.queue = Queue()
    if is_rejected:
        if not hasattr(EngineCoreOutput, "error"):
            pytest.skip("a paused engine of this vLLM lets requests wait")
        from vllm.outputs import RequestError  # since 0.32

        error = RequestError(code="paused", message="The engine is paused.")
        processor.process_outputs(
            [EngineCoreOutput(internal_id, [], finish_reason=FinishReason.ERROR, error=error)]
        )
    else:
        processor._finish_request(state)
    assert not processor.request_states
    (trace,) = client.routes(name, wait_s=10)
    assert (trace.finish_reason, trace.complete) == ("error", False)
    assert (trace.num_tokens, trace.present.any()) == (len(PROMPT), False)
    assert not_routed(deployment) - before == len(PROMPT) - 1
    assert internal_id not in deployment.app.state.moescope_registration._running


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
        asyncio.run(collector.ask(RecentQuery(limit=1, before=2**64)))
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
    assert "X-Moescope 'maybe': expected one of on, off" in answer.json()["error"]["message"]


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
