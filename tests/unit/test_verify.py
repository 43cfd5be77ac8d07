"""What `moescope verify` calls equal, a near-tie and a mismatch; and what it says of it."""

from __future__ import annotations

import base64
import dataclasses
import json

import httpx
import numpy as np
import pytest
from client_fakes import INFO

from moescope import RouteTrace, Source, formats
from moescope.errors import CommandError
from moescope_service.verify.comparison import TIE_FACTOR, Routes, compare
from moescope_service.verify.requests import Asker
from moescope_service.verify.run import Options, verify

LOGITS = np.array([4.0, 3.0, 2.0, 1.0, 0.0, -1.0])


def reference(noise: float = 1e-6, num_tokens: int = 6, num_layers: int = 2) -> Routes:
    """Routes by softmax top-3 of 6; each token and layer prefers other experts."""
    logits = np.stack(
        [[np.roll(LOGITS, 2 * token + layer) for layer in range(num_layers)]
         for token in range(num_tokens)]
    )  # fmt: skip
    ids = np.argsort(-logits, -1)[..., :3]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights = np.take_along_axis(probabilities, ids, -1)
    return Routes(ids, weights, logits, np.full(num_layers, noise))


def trace_of(want: Routes, weights_dtype: str = "float32", **changes: object) -> RouteTrace:
    num_rows, num_layers, _ = want.topk_ids.shape
    values = {
        "request_id": "cmpl-1", "index": 0, "model": "demo", "num_experts": 6,
        "num_hidden_layers": num_layers, "layers": np.arange(num_layers, dtype=np.int32),
        "topk_ids": want.topk_ids[..., ::-1].astype(np.uint8),
        "topk_weights": want.topk_weights[..., ::-1].astype(weights_dtype),
        "source": np.zeros(num_rows, np.uint8), "prompt_len": 4, "num_tokens": num_rows + 1,
        "token_ids": np.arange(num_rows + 1, dtype=np.int32), "cached_len": 0,
        "finish_reason": "length", "complete": True, "created_s": 0.0,
    }  # fmt: skip
    return RouteTrace(**{**values, **changes})


@pytest.mark.parametrize("weights_dtype", ["float32", "float16"])
def test_the_same_routes_in_any_order(weights_dtype):
    want = reference()
    counts = compare(trace_of(want, weights_dtype), want)
    assert (counts.rows, counts.equal, counts.near_ties, counts.mismatches) == (12, 12, 0, 0)
    assert counts.wrong_weights == 0
    assert counts.is_good


def swapped(want: Routes, gap: float) -> tuple[Routes, RouteTrace]:
    """The routes of a server that sees the third and fourth expert of a row the other way round."""
    logits = want.scores.copy()
    third, fourth = np.argsort(-logits[2, 1])[2:4]
    logits[2, 1, fourth] = logits[2, 1, third] - gap
    changed = dataclasses.replace(want, scores=logits)
    ids = want.topk_ids.copy()
    ids[2, 1, 2] = fourth
    return changed, trace_of(dataclasses.replace(want, topk_ids=ids))


@pytest.mark.parametrize("noise", [1e-6, 0.01])
def test_a_near_tie_is_not_equal_and_no_mismatch(noise):
    tolerance = TIE_FACTOR * noise
    want, trace = swapped(reference(noise), 0.9 * tolerance)
    counts = compare(trace, want)
    assert (counts.equal, counts.near_ties, counts.mismatches) == (11, 1, 0)
    assert counts.largest_gap == pytest.approx(0.9)
    want, trace = swapped(reference(noise), 1.1 * tolerance)
    counts = compare(trace, want)
    assert (counts.equal, counts.near_ties, counts.mismatches) == (11, 0, 1)
    assert not counts.is_good


def test_an_expert_twice_is_a_mismatch():
    want = reference()
    trace = trace_of(want)
    trace.topk_ids[3, 0, 0] = trace.topk_ids[3, 0, 1]
    counts = compare(trace, want)
    assert (counts.equal, counts.near_ties, counts.mismatches) == (11, 0, 1)


def test_rows_of_the_neighbor_are_mismatches():
    want = reference()
    counts = compare(trace_of(want), want, shift=1)
    assert (counts.rows, counts.mismatches) == (10, 10)


def test_missing_rows_are_missing_whatever_they_hold():
    want = reference()
    trace = trace_of(want)
    trace.source[1:3] = Source.MISSING
    trace.topk_ids[1:3] = 0
    counts = compare(trace, want)
    assert (counts.rows, counts.missing, counts.equal, counts.mismatches) == (12, 4, 8, 0)
    assert not counts.is_good


def test_weights_are_judged_by_the_noise():
    want = reference()
    trace = trace_of(want)
    trace.topk_weights[0, 0, 2] *= 1.01
    counts = compare(trace, want)
    assert (counts.equal, counts.wrong_weights, counts.is_good) == (12, 1, False)
    assert counts.largest_weight_error == pytest.approx(
        0.01 * want.topk_weights[0, 0].max(), rel=1e-4
    )
    assert compare(trace, dataclasses.replace(want, noise=np.full(2, 0.01))).wrong_weights == 0


class FakeServer:
    """Answers as a server does whose vLLM returns its own ids."""

    def __init__(self, trace: RouteTrace, vllm: RouteTrace | None) -> None:
        self.trace, self.vllm = trace, vllm
        self.lost = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        match request.url.path:
            case "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "demo"}]})
            case "/moescope/info":
                return httpx.Response(200, json=INFO)
            case "/metrics":
                line = 'moescope_trace_rows_missing_total{cause="paused",model_name="demo"}'
                return httpx.Response(200, text=f"# HELP x\n{line} {self.lost}.0\n")
            case "/v1/completions":
                return self._complete(request)
            case "/routes/cmpl-1" if request.url.params["format"] == "npz":
                return httpx.Response(200, content=formats.dump_npz([self.trace]))
            case "/routes/cmpl-1":
                return httpx.Response(200, content=formats.dump_npy(self.trace))
        raise AssertionError(request.url)

    def _complete(self, request: httpx.Request) -> httpx.Response:
        assert request.headers["X-Moescope"] == "on"
        assert json.loads(request.content)["model"] == "demo"
        self.lost += int((~self.trace.present).sum())
        tokens = self.trace.token_ids.tolist()
        choice = {"prompt_token_ids": tokens[:4], "token_ids": tokens[4:]}
        if self.vllm is not None:
            choice["routed_experts"] = base64.b64encode(formats.dump_npy(self.vllm)).decode()
        return httpx.Response(200, json={"id": "cmpl-1", "choices": [choice]})


def run(server: FakeServer) -> tuple[bool, str]:
    said: list[str] = []
    asker = Asker("http://fake", None, transport=httpx.MockTransport(server))
    try:
        is_good = verify(asker, ["a", "b"], Options(against="vllm"), said.append)
    finally:
        asker.close()
    return is_good, "\n".join(said)


def test_against_vllm():
    trace = trace_of(reference())
    is_good, said = run(FakeServer(trace, trace))
    assert is_good
    assert "3 sequences, 18 routed tokens" in said
    assert "rows (token, layer): 36, byte for byte vLLM's own: 36, missing: 0" in said
    other = trace_of(reference())
    other.topk_ids[0, 0, 0] = 5
    is_good, said = run(FakeServer(trace, other))
    assert not is_good
    assert "byte for byte vLLM's own: 0" in said
    assert "NOT everything matches" in said


def test_missing_rows_are_told_by_cause():
    trace = trace_of(reference(), complete=False)
    trace.source[2] = Source.MISSING
    is_good, said = run(FakeServer(trace, trace_of(reference())))
    assert not is_good
    assert "missing: 6" in said
    assert "by cause: paused 3" in said


def test_a_server_that_returns_no_ids_of_its_own():
    with pytest.raises(CommandError, match="--enable-return-routed-experts"):
        run(FakeServer(trace_of(reference()), None))


def test_other_tokens_than_those_of_the_response():
    trace = trace_of(reference())
    server = FakeServer(trace, trace)
    server.trace = dataclasses.replace(trace, token_ids=trace.token_ids + 1)
    assert run(server)[0]
    answer = server._complete
    server._complete = lambda request: httpx.Response(
        200,
        json={**(values := answer(request).json()),
              "choices": [{**values["choices"][0], "token_ids": [9, 9, 9]}]},
    )  # fmt: skip
    with pytest.raises(CommandError, match="other tokens than the response"):
        run(server)


def test_the_checkpoint_must_be_named():
    asker = Asker("http://fake", None, transport=httpx.MockTransport(lambda _: None))
    with pytest.raises(CommandError, match="--model"):
        verify(asker, ["a"], Options(), print)
    asker.close()
