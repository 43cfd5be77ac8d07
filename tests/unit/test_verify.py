"""What `moescope verify` asks of a server, what it says of it, and what it refuses."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable

import httpx
import pytest
from client_fakes import INFO
from stream_server import DONE, serving
from verify_fakes import reference, trace_of

from moescope import ConnectionFailedError, FormatError, RouteTrace, Source, formats
from moescope.errors import CommandError, MoescopeError
from moescope_service.verify.completions import VerifiedServer
from moescope_service.verify.run import VerifyOptions, verify


class FakeServer:
    """Answers as a server does whose vLLM returns its own ids."""

    def __init__(self, trace: RouteTrace, vllm: RouteTrace | None) -> None:
        self.trace, self.vllm = trace, vllm
        self.lost = 0
        self.cache = 'block_size="4",enable_prefix_caching="True"'
        self.max_model_len: object = 1000
        self.prompts: list[str | list[int]] = []
        self.num_traces = 1

    def __call__(self, request: httpx.Request) -> httpx.Response:
        match request.url.path:
            case "/v1/models":
                return httpx.Response(
                    200, json={"data": [{"id": "demo", "max_model_len": self.max_model_len}]}
                )
            case "/moescope/info":
                return httpx.Response(200, json=INFO)
            case "/metrics":
                line = 'moescope_trace_rows_missing_total{cause="paused",model_name="demo"}'
                other = line.replace("demo", "b")
                cache = f"vllm:cache_config_info{{{self.cache}}} 1.0"
                lines = ("# HELP x", f"{line} {self.lost}.0", f"{other} 0.0", cache)
                return httpx.Response(200, text="\n".join(lines) + "\n")
            case "/v1/completions":
                return self._complete(request)
            case "/routes/cmpl-1" if request.url.params["format"] == "npz":
                return httpx.Response(200, content=formats.dump_npz(self.traces()))
            case "/routes/cmpl-1":
                return httpx.Response(200, content=formats.dump_npy(self.trace))
        raise AssertionError(request.url)

    def traces(self) -> list[RouteTrace]:
        return [dataclasses.replace(self.trace, index=i) for i in range(self.num_traces)]

    def _complete(self, request: httpx.Request) -> httpx.Response:
        assert request.headers["X-Moescope"] == "on"
        body = json.loads(request.content)
        assert body["model"] == "demo"
        self.prompts.append(body["prompt"])
        self.lost += int((~self.trace.present).sum())
        tokens = self.trace.token_ids.tolist()
        choice = {"prompt_token_ids": tokens[:4], "token_ids": tokens[4:]}
        if self.vllm is not None:
            choice["routed_experts"] = base64.b64encode(formats.dump_npy(self.vllm)).decode()
        return httpx.Response(200, json={"id": "cmpl-1", "choices": [choice]})


def run(server: FakeServer) -> tuple[bool, str]:
    said: list[str] = []
    with VerifiedServer("http://fake", None, transport=httpx.MockTransport(server)) as verified:
        is_good = verify(verified, ["a", "b"], VerifyOptions(against="vllm"), said.append)
    return is_good, "\n".join(said)


def test_against_vllm():
    trace = trace_of(reference().logits)
    is_good, said = run(FakeServer(trace, trace))
    assert is_good
    assert "4 sequences, 24 routed tokens, 0 of them from the prefix cache" in said
    assert "pairs (token, layer): 48, byte for byte vLLM's own: 48, missing: 0" in said
    other = trace_of(reference().logits)
    other.topk_ids[0, 0, 0] = 5
    is_good, said = run(FakeServer(trace, other))
    assert not is_good
    assert "byte for byte vLLM's own: 0" in said
    assert "NOT everything matches" in said


def test_missing_rows_are_told_by_cause():
    trace = trace_of(reference().logits, complete=False)
    trace.source[2] = Source.MISSING
    is_good, said = run(FakeServer(trace, trace_of(reference().logits)))
    assert not is_good
    assert "missing: 8" in said
    assert "by cause: paused 4" in said


def test_a_prompt_of_more_than_a_block_is_asked_twice():
    trace = trace_of(reference().logits)
    trace.source[:4] = Source.CACHED
    server = FakeServer(trace, trace)
    is_good, said = run(server)
    assert is_good
    assert sorted(server.prompts[:2]) == ["a", "b"]
    assert server.prompts[2:] == [[0, 1, 2, 3, 4, 5, 6, 0, 1]] * 2  # two blocks and a token
    assert "16 of them from the prefix cache\n" in said
    assert "asked twice" not in said


def test_a_prefix_cache_that_finds_nothing_is_told():
    trace = trace_of(reference().logits)
    _, said = run(FakeServer(trace, trace))
    assert "a prompt of 4 tokens was asked twice, but nothing came from the prefix cache" in said


@pytest.mark.parametrize(
    ("cache", "longest", "words"),
    [
        ('block_size="4",enable_prefix_caching="False"', 1000, "has prefix caching off"),
        ('block_size="4",enable_prefix_caching="True"', 36, "has a whole block of 4 tokens"),
        ('block_size="None"', 160, "has a whole block of 128 tokens"),
        ('block_size="999999999"', "?", "has a whole block of 999,999,999 tokens"),
    ],
)
def test_why_no_prompt_was_asked_twice(cache, longest, words):
    trace = trace_of(reference().logits)
    server = FakeServer(trace, trace)
    server.cache, server.max_model_len = cache, longest
    is_good, said = run(server)
    assert is_good
    assert len(server.prompts) == 2
    assert words in said


@pytest.mark.parametrize("num_traces", [0, 2])
def test_another_number_of_traces_than_one_is_told(num_traces):
    trace = trace_of(reference().logits)
    server = FakeServer(trace, trace)
    server.num_traces = num_traces
    check_refusal(server, f"expected one trace of .*cmpl-1.* got {num_traces}")


@pytest.mark.parametrize("token", [-1, 2**31, 2**63, 2**100, 1.5, True, "7", None])
def test_a_token_that_is_none_is_told(token):
    trace = trace_of(reference().logits)
    server = FakeServer(trace, trace)
    change_choice(server, token_ids=[4, token, 6])
    check_refusal(server, "not a completion with token ids: .*the token")


@pytest.mark.parametrize("request_id", ["", None, 7, ["cmpl-1"]])
def test_a_completion_without_an_id_is_told(request_id):
    trace = trace_of(reference().logits)
    server = FakeServer(trace, trace)
    change_choice(server, request_id=request_id)
    check_refusal(server, "not a completion with token ids: .*the id is")


@pytest.mark.parametrize("count", ["x", "NaN", "1e999", "inf"])
def test_a_count_of_missing_rows_that_is_none_is_told(count):
    trace = trace_of(reference().logits)
    server = FakeServer(trace, trace)
    server.cache = f'}} 1\nmoescope_trace_rows_missing_total{{cause="x"}} {count}\nvllm:y{{'
    check_refusal(server, "/metrics has a count that is none")


def check_refusal(server: FakeServer, words: str) -> None:
    """Check that the server is refused in one line."""
    with pytest.raises(MoescopeError, match=words) as caught:
        run(server)
    assert "\n" not in str(caught.value)


def change_choice(server: FakeServer, request_id: object = "cmpl-1", **changes: object) -> None:
    answer: Callable[[httpx.Request], httpx.Response] = server._complete

    def changed(request: httpx.Request) -> httpx.Response:
        (choice,) = answer(request).json()["choices"]
        return httpx.Response(200, json={"id": request_id, "choices": [{**choice, **changes}]})

    server._complete = changed


def test_a_server_that_returns_no_ids_of_its_own():
    with pytest.raises(CommandError, match="--enable-return-routed-experts"):
        run(FakeServer(trace_of(reference().logits), None))


def test_other_tokens_than_those_of_the_response():
    trace = trace_of(reference().logits)
    server = FakeServer(trace, trace)
    server.trace = dataclasses.replace(trace, token_ids=trace.token_ids + 1)
    assert run(server)[0]
    change_choice(server, token_ids=[9, 9, 9])
    with pytest.raises(CommandError, match="other tokens than the response"):
        run(server)


def test_the_checkpoint_must_be_named():
    transport = httpx.MockTransport(lambda _: None)
    with (
        VerifiedServer("http://fake", None, transport=transport) as server,
        pytest.raises(CommandError, match="--model"),
    ):
        verify(server, ["a"], VerifyOptions(), print)


def test_a_server_that_captures_no_layer_is_told():
    info = httpx.MockTransport(lambda _: httpx.Response(200, json={**INFO, "layers": []}))
    with (
        VerifiedServer("http://fake", None, transport=info) as server,
        pytest.raises(CommandError, match="captures no layer"),
    ):
        verify(server, ["a"], VerifyOptions(model="demo"), print)


def completions_of(url: str, api_key: str | None = None) -> list:
    with VerifiedServer(url, api_key, timeout_s=30.0) as server:
        return server.complete(["a"], 4)


def test_no_proxy_sees_the_key_on_the_way_to_this_machine(monkeypatch):
    with serving(lambda *_: [(0, DONE)]) as server, serving(lambda *_: [(0, DONE)]) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        server.pages["/v1/models"] = b'{"data": [{"id": "demo"}]}'
        with pytest.raises(FormatError, match="JSON object"):  # an event is no completion
            completions_of(server.url, "secret")
    assert proxy.connections == 0
    assert b"Bearer secret" in server.seen[0].headers


def test_a_server_that_lists_no_model_is_told():
    with serving(lambda *_: [(0, DONE)]) as server:
        server.pages["/v1/models"] = b'{"data": []}'
        with pytest.raises(FormatError, match="/v1/models lists no model"):
            completions_of(server.url)


def test_a_key_that_no_header_can_carry_is_told():
    with pytest.raises(CommandError, match="invalid API key"):
        VerifiedServer("http://127.0.0.1:9", "cl\u00e9")


def test_a_server_that_is_not_there_is_told():
    with pytest.raises(ConnectionFailedError, match=r"cannot reach http://127\.0\.0\.1:9"):
        completions_of("http://127.0.0.1:9")


@pytest.mark.parametrize("choice", [{}, {"prompt_token_ids": None, "token_ids": None}])
def test_a_completion_without_token_ids_is_told(choice):
    trace = trace_of(reference().logits)
    server = FakeServer(trace, None)
    server._complete = lambda request: httpx.Response(
        200, json={"id": "cmpl-1", "choices": [choice]}
    )
    with pytest.raises(FormatError, match="not a completion with token ids"):
        run(server)
