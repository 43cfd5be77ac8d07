"""The ids that clients choose find their requests, whatever endpoint of vLLM takes them."""

from __future__ import annotations

import httpx
import pytest

from benchmarks.simulation.server import API_KEY, MODEL
from moescope import Client
from moescope.servers import Server

QUESTION = [{"role": "user", "content": "Tom has 3 apples."}]
BODIES = {
    "/v1/chat/completions": {"messages": QUESTION, "max_tokens": 4},
    "/v1/completions": {"prompt": "Tom has", "max_tokens": 4},
    "/v1/messages": {"messages": QUESTION, "max_tokens": 4},
    "/v1/responses": {"input": "Tom has 3 apples.", "max_output_tokens": 4},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("has_header", [False, True])
def test_own_ids(path: str, has_header: bool, eager_server: Server, eager: Client) -> None:
    in_body, in_header = f"zürich{path}-{has_header}", f"genève{path}"
    headers = {"Authorization": f"Bearer {API_KEY}".encode()}
    if has_header:
        headers["X-Request-Id"] = in_header.encode()
    response = httpx.post(
        eager_server.url + path,
        json={"model": MODEL, "request_id": in_body, **BODIES[path]},
        headers=headers,
        timeout=60,
    )
    assert response.status_code == 200, response.text
    (trace,) = eager.routes(response.json()["id"])
    assert trace.complete
    for own in [in_body, *([in_header] if has_header else [])]:
        (found,) = eager.routes(own)
        assert found.request_id == trace.request_id
