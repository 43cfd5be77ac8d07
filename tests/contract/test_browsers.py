"""Pages of other sites are kept away, whether they say so or take a name that leads here."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import ClassVar

import pytest

from benchmarks.simulation.app import server_args
from moescope_service.vllm_contract import compat

from .deployment import Deployment
from .test_failures import GUARDED

FRIEND = "https://friend.example"


@pytest.fixture(scope="module")
def locked():
    with Deployment(api_key=["secret"], allowed_origins=[FRIEND]).running() as deployment:
        deployment.http.headers["Authorization"] = "Bearer secret"
        yield deployment


@pytest.fixture(scope="module")
def named():
    with Deployment(allowed_hosts="moe.example.org, Box.lan").running() as deployment:
        yield deployment


def refused(answer, *words):
    assert answer.status_code == 403, answer.text
    message = answer.json()["error"]["message"]
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "null"},
        {"Origin": "https://evil.example"},
    ],
)
def test_a_page_of_another_site(deployment, method, path, headers):
    refused(deployment.http.request(method, path, headers=headers), "another site's page")


@pytest.mark.parametrize(
    "origin", ["null", "https://evil.example", "http://127.0.0.1", "http://127.0.0.1.evil", "["]
)
def test_an_origin_that_is_not_this_host(locked, origin):
    refused(locked.http.get("/routes", headers={"Origin": origin}), "--allowed-origins")


def test_a_form_pauses_nothing(deployment):
    form = {"Origin": "https://evil.example", "Content-Type": "application/x-www-form-urlencoded"}
    refused(deployment.http.post("/routes/pause", headers=form, content="a=b"))
    assert deployment.http.get("/moescope/info").json()["capture"] == "on"


def test_pages_of_our_own(deployment):
    for headers in (
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": deployment.url},
        {"Origin": deployment.url, "Sec-Fetch-Site": "same-origin"},
    ):
        assert deployment.http.get("/routes", headers=headers).status_code == 200, headers


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://moe.example.org", "moe.example.org"),  # a proxy took the TLS away
        ("https://moe.example.org", "moe.example.org:443"),
        ("http://Box.LAN:8000", "box.lan:8000"),
    ],
)
def test_one_host_is_written_in_several_ways(named, origin, host):
    headers = {"Origin": origin, "Host": host}
    assert named.http.get("/routes", headers=headers).status_code == 200


def test_origins_that_vllm_allows(locked):
    for site in ({}, {"Sec-Fetch-Site": "cross-site"}):
        assert locked.http.get("/routes", headers={"Origin": FRIEND, **site}).status_code == 200
    with Deployment(allowed_origins=["*"]).running() as everyone:
        answer = everyone.http.get("/routes", headers={"Origin": FRIEND})
        if server_args().allowed_origins == ["*"]:  # vLLM's default until 0.31: nobody's wish
            refused(answer)
        else:
            assert answer.status_code == 200
        refused(everyone.http.get("/routes", headers={"Sec-Fetch-Site": "cross-site"}))


def test_all_origins_are_a_wish_where_none_is_the_default():
    class Command:
        """vLLM's, with another default."""

        default: ClassVar[list[str]]

        def subparser_init(self, subparsers):
            parser = subparsers.add_parser("serve")
            parser.add_argument("--allowed-origins", default=self.default)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.entrypoints.cli.serve.ServeSubcommand", Command)
        for Command.default, counts in (([], ["*", "a"]), (["*"], ["a"])):
            args = SimpleNamespace(allowed_origins=["*", "a"])
            assert compat.allowed_origins(args) == counts


KNOWN = ["localhost", "localhost.", "box:8000", "10.0.0.5:8000", "[::1]:8000", "[fd00::5]"]
KNOWN += [socket.gethostname()]
STRANGE = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "xmoe.example.org"]


@pytest.mark.parametrize("host", [*KNOWN, "moe.example.org", "MOE.example.org:8000", "box.lan."])
def test_hosts_that_browsers_may_name(named, host):
    headers = {"Sec-Fetch-Site": "same-origin", "Host": host}
    assert named.http.get("/routes", headers=headers).status_code == 200


@pytest.mark.parametrize("host", [*STRANGE, ""])
def test_a_name_that_somebody_leads_here(named, locked, host):
    for browser in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": f"http://{host or 'x'}"}):
        answer = named.http.get("/routes", headers={"Host": host, **browser})
        refused(answer, "" if "Origin" in browser else "--routes-allowed-hosts")
    answer = locked.http.get("/routes", headers={"Host": host, "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200, "a page has no key of this server"


@pytest.mark.parametrize("host", STRANGE)
def test_programs_are_not_asked(deployment, host):
    assert deployment.http.get("/routes", headers={"Host": host}).status_code == 200


def test_metrics_are_as_open_as_vllm_leaves_them(deployment):
    headers = {"Host": "evil.example", "Sec-Fetch-Site": "cross-site", "Origin": "https://x.y"}
    assert deployment.http.get("/metrics", headers=headers).status_code == 200
