"""What the page says where something is wrong: keys, the collector, the server, counts alone."""

from __future__ import annotations

from moescope_service.runtime import collector_address
from tests.contract.deployment import Deployment, start_collector

STATE = "document.querySelector('#status').dataset.state"
TOTAL = "document.querySelector('#heatmap').dataset.total"


def expect_errors(page, *statuses):
    """The browser logs failed requests; anything else is a fault of the page."""
    words = tuple(f"the server responded with a status of {one}" for one in statuses)
    page.problems[:] = [one for one in page.problems if not any(word in one for word in words)]


def problem(page):
    return page.js("document.querySelector('#problem').textContent")


def test_a_key_is_asked_for_and_kept_nowhere(page):
    with Deployment(api_key=["secret"]).running() as deployment:
        page.open(f"{deployment.url}/moescope")
        page.wait(f"{STATE} === 'locked'")
        page.type("#key", "wrong")
        page.wait(f"{STATE} === 'locked'")
        assert "API key" in problem(page)
        page.type("#key", "secret")
        page.wait(f"{STATE} === 'ok' && {TOTAL} !== undefined")
        kept = "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert page.js(kept) == [0, 0, "", f"{deployment.url}/moescope"]
        page.js("location.hash = '#state'")
        page.wait("document.querySelectorAll('#state article').length")
    expect_errors(page, 401)


def test_a_collector_that_died_and_came_back(page, fresh):
    page.open(f"{fresh.url}/moescope")
    page.wait(f"{STATE} === 'ok'")
    fresh.kill_collector()
    page.wait(f"{STATE} === 'waiting'")
    assert "collector process" in problem(page)
    fresh.collector.stdout.close()
    fresh.collector = start_collector(collector_address(), 1)
    page.wait(f"{STATE} === 'ok' && document.querySelector('#problem').hidden")
    expect_errors(page, 503)


def test_a_server_that_went_away(page):
    with Deployment().running() as deployment:
        page.open(f"{deployment.url}/moescope#requests")
        page.wait(f"{STATE} === 'ok'")
        assert "No request has been recorded yet" in page.js(
            "document.querySelector('#requests-note').textContent"
        )
    page.wait(f"{STATE} === 'away'")
    page.problems[:] = [one for one in page.problems if "ERR_CONNECTION" not in one]


def test_a_server_that_keeps_no_routes(page):
    with Deployment(mode="counts").running() as deployment:
        page.open(f"{deployment.url}/moescope")
        page.wait(f"{STATE} === 'ok' && {TOTAL} !== undefined")
        page.js("location.hash = '#requests'")
        page.wait("!document.querySelector('#problem').hidden")
        assert "keeps no routes" in problem(page)
    expect_errors(page, 409)
