"""The seam to HTTP: who is reached, with which key."""

import asyncio

import httpx
import pytest
from stream_server import DONE, serving

from moescope import Client, CommandError, ConnectionFailedError, ServerError, http, servers


@pytest.mark.parametrize(
    ("url", "heeded"),
    [
        ("http://localhost:8000", False),
        ("http://LOCALHOST:8000", False),
        ("http://127.0.0.1:8000", False),
        ("http://127.0.0.2:8000", False),
        ("http://0.0.0.0:8000", False),
        ("http://[::1]:8000", False),
        ("http://moe:8000", True),
        ("https://10.0.0.1", True),
    ],
)
def test_the_environments_proxies_are_for_other_machines(url, heeded):
    with http.connect(url) as client:
        assert client.trust_env is heeded
    assert http.connect_async(url).trust_env is heeded


def test_no_client_sends_the_key_through_a_proxy_to_this_machine(tmp_path, monkeypatch):
    async def first_model(url):
        async with http.connect_async(url, "secret") as client:
            return http.first_model(await client.get("/v1/models"))

    with serving(lambda *_: [(0, DONE)]) as server, serving(lambda *_: [(0, DONE)]) as proxy:
        for name in ("HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        server.pages["/v1/models"] = b'{"data": [{"id": "demo"}]}'
        server.pages["/health"] = b"{}"
        server.pages["/routes?limit=50"] = b'{"sequences": [], "next_before": null}'
        assert asyncio.run(first_model(server.url)) == "demo"
        assert servers.Server("x", (), server.url, tmp_path / "log", {}).is_ready()
        with Client(server.url, "secret") as client:
            assert client.recent().sequences == ()
    assert (server.connections, proxy.connections) == (3, 0)


@pytest.mark.parametrize("key", ["clé", "secret\n", " secret", "a\x00b"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key):
    for connect in (http.connect, http.connect_async):
        with pytest.raises(CommandError, match="invalid API key") as raised:
            connect("http://moe", key)
        assert key not in str(raised.value)


def models(*names, status=200):
    page = httpx.Request("GET", "http://moe/v1/models")
    return httpx.Response(status, json={"data": [{"id": name} for name in names]}, request=page)


def test_a_model_that_is_not_served_is_refused_with_those_that_are():
    assert http.served_model(models("a", "b")) == "a"
    assert http.served_model(models("a", "b"), "b") == "b"
    with pytest.raises(CommandError) as raised:
        http.served_model(models("a", "b"), "c")
    assert str(raised.value) == "invalid --model 'c': http://moe/v1/models lists a, b"
    with pytest.raises(CommandError, match=r"m19 and 480 more$"):
        http.served_model(models(*(f"m{number}" for number in range(500))), "c")


def test_a_model_is_not_checked_where_the_server_has_no_list():
    for status in (404, 405, 501):
        assert http.served_model(models(status=status), "m") == "m"
    with pytest.raises(ServerError):
        http.served_model(models(status=404))
    with pytest.raises(ServerError):
        http.served_model(models(status=503), "m")


def test_what_fails_within_a_response_is_an_error_of_the_connection():
    """A body that cannot be decoded is no matter of httpx's callers."""
    script = [404, b"no gzip", b"Content-Encoding: gzip\r\n"]
    with (
        serving(lambda *_: list(script)) as server,
        http.connect(server.url) as client,
        pytest.raises(ConnectionFailedError, match=f"the response of {server.url}/ is no gzip"),
    ):
        client.post("/", json={})
