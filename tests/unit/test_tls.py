"""HTTPS to this machine and others: whose certificates are trusted, and how that is said."""

from __future__ import annotations

import asyncio
import socket
import ssl

import pytest
from tls import Authority, serving

from moescope import AsyncClient, Client, CommandError, ConnectionFailedError
from moescope.bench import session
from moescope.bench.connections import Connections, Target

HOSTS = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "[::1]": "::1"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(params=HOSTS)
def served(request, authority, monkeypatch):
    """The address of a server by each name of this machine; proxies that would be a mistake."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    if HOSTS[request.param] == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with serving(authority, HOSTS[request.param]) as server:
        yield f"https://{request.param}:{server.server_port}", server


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


def fetched(url, **kwargs):
    with Client(url, **kwargs) as client:
        return client.info().model


async def fetched_async(url, **kwargs):
    async with AsyncClient(url, **kwargs) as client:
        return (await client.info()).model


async def streamed(url, **kwargs):
    connections = Connections(Target(base_url=url, **kwargs), "/v1/completions")
    try:
        async with connections.stream(b"{}") as parts:
            return b"".join([part async for part in parts])
    finally:
        await connections.aclose()


def test_the_environments_authorities_count_for_this_machine_too(served, authority, monkeypatch):
    url, _ = served
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    assert fetched(url) == "demo"
    assert asyncio.run(fetched_async(url)) == "demo"
    assert b'"model":"demo"' in asyncio.run(streamed(url))


def test_a_directory_of_authorities(authority, monkeypatch):
    directory = authority.directory()
    with serving(authority, "127.0.0.1") as server:
        url = f"https://localhost:{server.server_port}"
        assert fetched(url, verify=directory) == "demo"
        monkeypatch.setenv("SSL_CERT_DIR", str(directory))
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        assert fetched(url) == "demo"


def test_an_authority_can_be_given(served, authority):
    url, _ = served
    for verify in (
        authority.file,
        str(authority.file),
        ssl.create_default_context(cafile=authority.file),
        False,
    ):
        assert fetched(url, verify=verify) == "demo"
        assert asyncio.run(fetched_async(url, verify=verify)) == "demo"
        assert asyncio.run(streamed(url, verify=verify))


def test_an_unknown_authority_is_told_at_once_with_what_to_do(served):
    url, server = served
    message = r"certificate verify failed.*--ca-cert \(verify in Python\) or SSL_CERT_FILE"
    with pytest.raises(ConnectionFailedError, match=message):
        fetched(url)
    assert server.asked == 1
    with pytest.raises(ConnectionFailedError, match=message):
        session.served_model(Target(base_url=url))


def test_a_certificate_for_another_name_is_no_matter_of_authorities(authority):
    with serving(authority, "127.0.0.2") as server:
        url = f"https://127.0.0.2:{server.server_port}"
        with pytest.raises(ConnectionFailedError, match="IP address mismatch") as raised:
            fetched(url, verify=authority.file)
    assert "--ca-cert" not in str(raised.value)


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_cannot_be_read_are_told(content, tmp_path, monkeypatch):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CommandError, match=f"cannot read certificates from {path}"):
        Client("https://localhost", verify=path)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(CommandError, match=f"cannot read certificates from {path}"):
        Client("https://localhost")
    Client("http://localhost").close()  # which needs none
