"""What is said of a request before its body is read, and how much of one is."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable

import pytest
from fastapi.routing import APIRoute

from tests.waiting import DEADLINE_S

from .deployment import Deployment

LARGEST_BYTES = 2**20
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def locked():
    with Deployment(api_key=["secret", "other"]).running() as deployment:
        yield deployment


def begin(deployment: Deployment, length: str, parts: Iterable[bytes] = (), key: str = "") -> int:
    """Send the beginning of a body whose end never comes; return the status of the answer."""
    host, port = deployment.url.removeprefix("http://").split(":")
    head = ["POST /routes/batch HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    head += [length, *([f"Authorization: Bearer {key}"] if key else []), "", ""]
    with socket.create_connection((host, int(port)), DEADLINE_S / 4) as connection:
        connection.sendall("\r\n".join(head).encode())
        with contextlib.suppress(BrokenPipeError):
            for part in parts:
                connection.sendall(part)
        return int(connection.recv(4096).split()[1])


@pytest.mark.parametrize("length", ["Content-Length: 30000000", CHUNKED])
def test_without_a_key_no_body_is_read(locked, length):
    assert begin(locked, length) == 401


def test_a_body_that_says_it_is_large_is_not_read(locked):
    assert begin(locked, f"Content-Length: {LARGEST_BYTES + 1}", key="secret") == 413


def test_a_body_is_read_as_far_as_it_may_be_large(locked):
    parts = [b"10000\r\n" + b" " * 2**16 + b"\r\n"] * 17  # 17 of 64 KiB each
    assert begin(locked, CHUNKED, parts, key="secret") == 413


def test_the_largest_batch_fits_and_the_next_one_is_told_what_to_do(deployment):
    headers = {"Content-Type": "application/json"}
    body = json.dumps({"request_ids": [f"{number:0512d}" for number in range(1024)]})
    body = body.ljust(LARGEST_BYTES)
    answer = deployment.http.post("/routes/batch", content=body, headers=headers)
    assert (answer.status_code, len(answer.json()["results"])) == (200, 1024)
    answer = deployment.http.post("/routes/batch", content=f"{body} ", headers=headers)
    assert answer.status_code == 413
    message = answer.json()["error"]["message"]
    assert "1,048,576" in message
    assert "fewer ids" in message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (dict.fromkeys([f"key{n:04}" for n in range(1000)]), "key0003: Extra inputs are not"),
        ({f"key{number:05}": 0 for number in range(50_000)}, "`object` of length <= 1024"),
        ({"start": dict.fromkeys(map(str, range(50_000)), -1)}, "of length <= 1024"),
        ({"request_ids": [[]] * 300_000}, "got `array` - at `$[...][0]`"),
        ({"request_ids": [1] * 300_000}, "at most 1024 items"),
    ],
    ids=["keys", "many keys", "keys inside", "lists", "numbers"],
)  # fmt: skip
def test_a_body_of_many_errors_is_told_of_a_few(deployment, body, words):
    answer = deployment.http.post("/routes/batch", json=body)
    assert answer.status_code == 422
    message = answer.json()["error"]["message"]
    assert words in message
    assert len(message) < 600


def test_every_endpoint_is_guarded_but_those_that_are_named(deployment):
    from moescope_service.api.endpoint import OPEN_PATHS, MoescopeRoute

    ours = [
        route
        for route in deployment.app.routes
        if isinstance(route, APIRoute) and route.endpoint.__module__.startswith("moescope_service")
    ]
    open_paths = {route.path for route in ours if not isinstance(route, MoescopeRoute)}
    assert len(ours) == 20
    assert open_paths == OPEN_PATHS
