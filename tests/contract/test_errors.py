"""Every error of our endpoints has the body that vLLM's own have."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from .deployment import Deployment

STATUSES = {
    "/routes/never-seen": 404,
    "/routes/never-seen?format=xml": 422,
    "/routes/never-seen?layers=x": 422,
    "/experts?phase=x": 422,
    "/routes?limit=0": 422,
}


def told(answer) -> str:
    """Check the body of an error; return its message."""
    error = ErrorResponse.model_validate_json(answer.content).error
    assert answer.json().keys() == {"error"}
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert (error.code, error.type) == (
        answer.status_code,
        HTTPStatus(answer.status_code).phrase,
    )
    return error.message


@pytest.mark.parametrize("url", STATUSES)
def test_bad_questions(deployment, url):
    answer = deployment.http.get(url)
    assert answer.status_code == STATUSES[url]
    assert told(answer)


@pytest.mark.parametrize("path", ["/v1/completions", "/routes"])
def test_a_header_that_says_neither_on_nor_off(deployment, path):
    answer = deployment.http.post(path, json={"id": "x"}, headers={"X-Moescope": "perhaps"})
    assert answer.status_code == 422
    assert told(answer) == "invalid header X-Moescope 'perhaps': expected one of on, off"


def test_a_body_that_is_none(deployment):
    answer = deployment.http.post("/routes/batch", content=b"{")
    assert answer.status_code == 422
    assert told(answer).startswith("body: ")
    answer = deployment.http.post("/routes/batch", content=b" " * (2**20 + 1))
    assert answer.status_code == 413
    assert told(answer)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/routes/some/id", "DELETE, GET"),
        ("POST", "/experts", "GET"),
        ("DELETE", "/moescope/info", "GET"),
        ("PUT", "/routes/pause", "POST"),
    ],
)
def test_a_method_that_is_not_taken(deployment, method, path, allowed):
    answer = deployment.http.request(method, path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
    assert f" takes {allowed}, not {method}" in told(answer)


def test_keys_pages_and_modes():
    with Deployment(api_key=["secret"], mode="counts").running() as deployment:
        key = {"Authorization": "Bearer secret"}
        answers = [
            deployment.http.get("/routes"),
            deployment.http.get("/routes", headers={**key, "Origin": "http://evil.example"}),
            deployment.http.get("/routes", headers=key),
        ]
        assert [answer.status_code for answer in answers] == [401, 403, 409]
        assert all(map(told, answers))
        assert answers[0].headers["WWW-Authenticate"] == "Bearer"
        deployment.kill_collector()
        answer = deployment.http.get("/experts", headers=key)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert told(answer)
