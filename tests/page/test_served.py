"""The page beside a real vLLM server that is under load, is killed in parts, and starts again."""

from __future__ import annotations

import collections
import functools
import http.server
import os
import signal
import threading

import httpx
import numpy as np
import pytest

from benchmarks.faults.served import collector_pid
from benchmarks.simulation.server import API_KEY, START_TIMEOUT_S
from moescope import Client
from moescope.servers import wait_ready
from tests.waiting import DEADLINE_S, wait_until

from .served import HEADERS, complete, replayed, vllm_server
from .test_states import STATE, TOTAL, expect_errors, problem
from .test_views import data, text

HOSTILE = (
    "<script>document.title = 'x'</script> <img src=x onerror=alert(1)> \"'`&amp; "
    "\u202eleft\u202c שלום 👩\u200d👩\u200d👧 </span>\ta\nb"
)
VIEW_STATE = f"{STATE} === 'ok'"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with vllm_server(tmp_path_factory.mktemp("served")) as started:
        yield started


def opened(page, server, view=""):
    """Open the page and give it the key."""
    page.open(f"{server.url}/moescope#{view}")
    page.wait(f"{STATE} === 'locked'")
    page.type("#key", API_KEY)
    page.wait(VIEW_STATE)
    expect_errors(page, 401)


def test_a_wrong_key_shows_nothing(page, server):
    page.open(f"{server.url}/moescope")
    page.wait(f"{STATE} === 'locked'")
    page.type("#key", "wrong")
    page.wait(f"{STATE} === 'locked'")
    assert "API key" in problem(page)
    assert page.js(TOTAL) is None
    expect_errors(page, 401)


def test_the_heatmap_and_the_list_change_under_load(page, tab, server, tmp_path):
    opened(page, server)
    other = tab()
    opened(other, server, "requests")
    with replayed(server, tmp_path, 100) as replay:
        seen = set()

        def changed():
            seen.add(page.js(TOTAL))
            return len(seen) >= 4

        wait_until(changed, "the heatmap changes")
        listed = {one["request"] for one in data(other, "#requests tbody tr")}
        first = "document.querySelector('#requests tbody tr')?.dataset.request"
        other.wait(f"{first} && !{[*listed]}.includes({first})")
        assert replay.wait(DEADLINE_S) == 0
    total = np.sum(httpx.get(f"{server.url}/experts", headers=HEADERS).json()["counts"])
    page.type("#window", "", "change")
    page.wait(f"{TOTAL} == {total}")
    newest = httpx.get(f"{server.url}/routes", headers=HEADERS).json()["sequences"][0]
    other.wait(f"{first} === '{newest['request_id']}'")
    assert other.problems == []
    other.close()


def traces_of_newest(server, number):
    """All traces of the newest requests."""
    with Client(server.url, api_key=API_KEY) as client:
        ids = [one.request_id for one in client.iter_recent() if one.status == "finished"]
        return [trace for one in [*dict.fromkeys(ids)][:number] for trace in client.routes(one)]


def test_an_experts_tokens_are_those_of_all_traces(page, server):
    traces = traces_of_newest(server, 200)
    assert len(traces) >= 100
    layer, layer_at = int(traces[0].layers[2]), 2
    selections = sum((trace.counts()[layer_at] for trace in traces), start=np.zeros(60, int))
    expert = int(selections.argmax())
    counts, totals = collections.Counter(), collections.Counter()
    for trace in traces:
        for row in np.flatnonzero(trace.present):
            token = int(trace.token_ids[row])
            totals[token] += 1
            counts[token] += expert in trace.topk_ids[row, layer_at]
    opened(page, server, f"expert/{layer}/{expert}")
    page.wait("document.querySelectorAll('#expert tbody tr').length")
    shown = [
        (int(one["token"]), int(one["count"]), int(one["total"]))
        for one in data(page, "#expert tbody tr")
    ]
    order = sorted(+counts, key=lambda token: (-counts[token], token))[:100]
    assert shown == [(token, counts[token], totals[token]) for token in order]
    assert f"{selections[expert]:,} of the {sum(totals.values()):,} tokens" in text(
        page, "#expert .facts"
    )
    page.js("document.querySelector('#expert tbody a').click()")
    page.wait("document.querySelectorAll('#request .token[tabindex=\"0\"]').length")
    chosen = data(page, "#request .detail tr.chosen .expert")
    assert str(expert) in {one["expert"] for one in chosen}


def test_a_request_shows_its_experts_its_text_and_what_was_cached(page, server):
    prompt = "Nora has 14 shells and finds 9 more at the beach. How many shells has she now? " * 2
    complete(server, prompt)
    request_id, trace = complete(server, prompt)
    cached = trace["cached_len"]
    assert cached > 0
    opened(page, server, f"request/{request_id}")
    page.wait(f"document.querySelectorAll('#request .token').length === {trace['num_tokens']}")
    for layer_at in (0, 3):
        page.type("#request [name=layer]", str(layer_at), "change")
        for position, token in enumerate(data(page, "#request .token")[:-1]):
            weights = trace["topk_weights"][position][layer_at]
            top = trace["topk_ids"][position][layer_at][int(np.argmax(weights))]
            assert int(token["expert"]) == top
            assert token["source"] == trace["source"][position]
    assert data(page, "#request .strip-marks i") == [
        {"source": "cached", "first": "0", "next": str(cached)}
    ]


def test_a_hostile_prompt_is_shown_as_itself(page, server):
    request_id, trace = complete(server, HOSTILE)
    opened(page, server, f"request/{request_id}")
    page.wait(f"document.querySelectorAll('#request .token').length === {trace['num_tokens']}")
    shown = page.js(
        "[...document.querySelectorAll('#request .token bdi')].map((one) => one.textContent)"
    )
    marks = {"\n": "⏎", "\t": "⇥", " ": "␣"}
    assert shown == ["".join(marks.get(char, char) for char in one) for one in trace["tokens"]]
    for word in ("script", "onerror", "</", "&amp"):
        assert word in "".join(shown), word
    assert page.js("document.title") == "moescope"
    assert page.js("document.querySelectorAll('#request img, #request script').length") == 0
    page.js("location.hash = '#request/%3Cscript%3Ealert(1)'")
    page.wait("document.querySelector('#problem').textContent.includes('<script>')")
    expect_errors(page, 404)


def test_two_requests_side_by_side(page, server):
    one, first = complete(server, "Tom has 3 apples and buys 4 more. How many has he?")
    two, second = complete(server, "Tom has 3 apples and eats 2 of them. How many has he?")
    opened(page, server, f"compare/{one}/{two}")
    page.wait("document.querySelectorAll('#compare .pair').length")
    rows = min(len(first["topk_ids"]), len(second["topk_ids"]))
    pairs = data(page, "#compare .pair")
    shares = [
        len({*a[0]} & {*b[0]}) / len(a[0])
        for a, b in zip(first["topk_ids"], second["topk_ids"], strict=False)
    ]
    assert [float(one["shared"]) for one in pairs[:rows]] == pytest.approx(shares)
    assert 0 < np.mean(shares) < 1
    same = [a == b for a, b in zip(first["token_ids"], second["token_ids"], strict=False)]
    assert [one["sameToken"] == "true" for one in pairs[: len(same)]] == same
    page.js(f"location.hash = '#request/{one}/{two}'")
    page.wait("document.querySelector('#request .token')?.dataset.agreement !== undefined")
    jaccard = [share / (2 - share) for share in shares]
    tokens = data(page, "#request .token")
    assert [float(one["agreement"]) for one in tokens[:rows]] == pytest.approx(jaccard)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_a_page_of_another_origin_reads_nothing(page, server, tmp_path, host):
    """127.0.0.1 on another port is of the same site, 127.0.0.2 is not."""
    (tmp_path / "index.html").write_text("<!doctype html><title>other</title>")
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer((host, 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        page.open(f"http://{host}:{other.server_port}/index.html")
        for path in ("routes", "routes?follow=true", "experts", "experts/0/0/tokens"):
            page.js(
                "window.told = undefined; "
                f"fetch('{server.url}/{path}', {{headers: {HEADERS}}})"
                ".then((answer) => answer.status, () => 'refused')"
                ".then((told) => { window.told = told; })"
            )
            page.wait("window.told !== undefined")
            assert page.js("window.told") in {"refused", 403}, path
        other.shutdown()
    page.problems.clear()  # the browser logs what it refused
    page.hosts = {one for one in page.hosts if not one.startswith("127.0.0.2:")}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, *args):
        """Log nothing."""


def test_a_collector_that_is_killed(page, server):
    opened(page, server)
    killed = set()

    def waiting():
        """Kill the next one too, until the page has noticed: it is started again at once."""
        if pid := collector_pid(server):
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return page.js(STATE) == "waiting"

    wait_until(waiting, "the page says so")
    assert "collector process" in problem(page)
    page.wait(f"{VIEW_STATE} && document.querySelector('#problem').hidden")
    assert collector_pid(server) not in {None, *killed}
    complete(server, "Ann reads 7 pages a day.")
    page.wait(f"{TOTAL} > 0")
    expect_errors(page, 503)


def test_a_server_that_starts_again(page, server):
    """It listens at the same address; the page knows the key still."""
    opened(page, server)
    before = httpx.get(f"{server.url}/moescope/info", headers=HEADERS).json()["started_s"]
    server.stop()
    page.wait(f"{STATE} === 'away'")
    assert "does not answer" in problem(page)
    with server:
        wait_ready([server], START_TIMEOUT_S)
        page.wait(f"{VIEW_STATE} && document.querySelector('#problem').hidden")
        complete(server, "Ben has 5 coins.")
        page.wait(f"{TOTAL} > 0")
        page.js("location.hash = '#requests'")
        page.wait("document.querySelectorAll('#requests tbody tr').length === 1")
        info = httpx.get(f"{server.url}/moescope/info", headers=HEADERS).json()
        assert info["started_s"] > before
        page.open("about:blank")
    page.problems[:] = [one for one in page.problems if "ERR_" not in one]
    expect_errors(page, 503, 502)
