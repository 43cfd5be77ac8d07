"""Calls are tried again where that can help, not too often, not too long, and it is told."""

from __future__ import annotations

import asyncio
import datetime as dt
import email.utils

import httpx
import pytest
from client_fakes import INFO, make_trace

import moescope
from moescope import batch, formats, http
from moescope.errors import CollectorDownError, ConnectionFailedError
from moescope.retries import Pause, Query, Retries


class Script:
    """A server in memory that does one thing after the other; what it was asked for."""

    def __init__(self, *steps):
        self.steps, self.asked = list(steps), []

    def __call__(self, request):
        self.asked.append(f"{request.method} {request.url.path}")
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, Exception):
            raise step
        status, body, *headers = step
        content = {"json": body} if isinstance(body, dict) else {"content": body}
        return httpx.Response(status, headers=dict(headers), **content)


DOWN = (503, {"detail": "down"}, ("Retry-After", "0"))
GONE = httpx.RemoteProtocolError("Server disconnected without sending a response.")
REFUSED = httpx.ConnectError("refused")


def driven(script, query, retries):
    """Do what the clients do; returns the response, and the pauses in place of making them."""
    pauses, steps = [], retries.send(query)
    answer = http.connect("http://moe", transport=httpx.MockTransport(script))
    step = next(steps)
    while True:
        try:
            if isinstance(step, Pause):
                pauses.append(step.seconds)
                step = steps.send(None)
                continue
            response = answer.request(**step.arguments())
        except ConnectionFailedError as error:
            step = steps.throw(error)
            continue
        try:
            step = steps.send(response)
        except StopIteration as end:
            return end.value, pauses


GET = Query(method="GET", path="/moescope/info")


@pytest.mark.parametrize(
    "failure", [DOWN, GONE, REFUSED, httpx.ReadError(""), httpx.ReadTimeout("")]
)
def test_what_passes_is_tried_again(failure, caplog):
    script = Script(failure, failure, (200, INFO))
    response, pauses = driven(script, GET, Retries(count=2))
    assert response.json() == INFO
    assert (len(script.asked), len(pauses)) == (3, 2)
    told = [record.getMessage() for record in caplog.records]
    assert [record.name for record in caplog.records] == ["moescope"] * 2
    assert "http://moe" in told[0]
    assert "; attempt 2 of 3 in " in told[0]
    assert "; attempt 3 of 3 in " in told[1]


@pytest.mark.parametrize(
    ("failure", "error"), [(DOWN, CollectorDownError), (GONE, ConnectionFailedError)]
)
def test_the_last_error_says_how_often_it_was_tried(failure, error):
    script = Script(failure)
    with pytest.raises(error, match=r"http://moe.*; tried 3 times in \d+\.\d s$") as raised:
        driven(script, GET, Retries(count=2))
    assert type(raised.value) is error
    assert len(script.asked) == 3


@pytest.mark.parametrize(
    "failure",
    [
        (404, {"detail": "Not Found"}),
        (500, {"detail": "no"}),
        (429, {"detail": "slowly"}),
        httpx.UnsupportedProtocol("x"),
        httpx.RemoteProtocolError("Invalid URL in location header"),
    ],
)
def test_what_does_not_pass_is_not(failure):
    script = Script(failure)
    with pytest.raises(moescope.MoescopeError) as raised:
        driven(script, GET, Retries(count=2))
    assert "tried" not in str(raised.value)
    assert len(script.asked) == 1


def test_pauses_double_unless_the_server_says_how_long():
    waits = [(503, {}, ("Retry-After", "7")), REFUSED, REFUSED, REFUSED, (200, INFO)]
    _, pauses = driven(Script(*waits), GET, Retries(count=4))
    assert pauses[0] == 7.0
    for number, pause_s in enumerate(pauses[1:], start=1):
        assert 0.25 * 2**number <= pause_s <= 0.5 * 2**number


def test_no_attempt_begins_after_half_a_minute():
    now_s = iter([0.0, 10.0, 29.9])  # the first attempt, and when each of them failed
    script = Script(REFUSED)
    with pytest.raises(ConnectionFailedError, match=r"tried 2 times in 29\.9 s"):
        driven(script, GET, Retries(count=100, clock=lambda: next(now_s)))
    script = Script((503, {"detail": "down"}, ("Retry-After", "120")))
    with pytest.raises(CollectorDownError) as raised:
        driven(script, GET, Retries(count=100))
    assert raised.value.retry_after_s == 120.0
    assert len(script.asked) == 1


def test_a_date_to_come_back_at():
    at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=20)
    script = Script((503, {}, ("Retry-After", email.utils.format_datetime(at, usegmt=True))))
    with pytest.raises(CollectorDownError) as raised:
        driven(script, GET, Retries(count=0))
    assert 15.0 < raised.value.retry_after_s <= 20.0


@pytest.mark.parametrize("value", ["", "-1", "soon", "9" * 5000, "1.5", "Fri, 99 Xyz 2026"])
def test_a_time_to_come_back_that_is_none(value):
    script = Script((503, {}, ("Retry-After", value)))
    with pytest.raises(CollectorDownError) as raised:
        driven(script, GET, Retries(count=0))
    assert raised.value.retry_after_s is None or raised.value.retry_after_s > 10**30


TRACE = make_trace()
REPEATED = {
    "routes": (lambda moe: moe.routes("x"), formats.dump_npz([TRACE])),
    "routes_batch": (
        lambda moe: moe.routes_batch(["x"]),
        batch.dump_npz(batch.RoutesBatch(status={"x": "finished"}, traces={"x": [TRACE]})),
    ),
    "recent": (lambda moe: moe.recent(), {"sequences": [], "next_before": None}),
    "experts": (
        lambda moe: moe.experts(),
        {"model": "m", "phase": "all", "since_s": 1.0, "num_rows": 0, "num_experts": 1,
         "layers": [0], "counts": [[0]]},
    ),
    "info": (lambda moe: moe.info(), INFO),
    "pause": (lambda moe: moe.pause(), {"capture": "paused"}),
    "resume": (lambda moe: moe.resume(), {"capture": "on"}),
}  # fmt: skip
ONCE = {"delete": lambda moe: moe.delete("x"), "reset": lambda moe: moe.reset()}


async def called(call, script):
    transport = httpx.MockTransport(script)
    async with moescope.AsyncClient("http://moe", transport=transport) as moe:
        return await call(moe)


@pytest.mark.parametrize("name", REPEATED)
def test_calls_that_may_be_repeated(name):
    call, body = REPEATED[name]
    script = Script(DOWN, (200, body))
    call(moescope.Client("http://moe", transport=httpx.MockTransport(script)))
    assert len(script.asked) == 2
    script = Script(DOWN, (200, body))
    asyncio.run(called(call, script))
    assert len(script.asked) == 2


@pytest.mark.parametrize("failure", [DOWN, GONE])
@pytest.mark.parametrize("name", ONCE)
def test_calls_that_may_not(name, failure):
    script = Script(failure)
    with pytest.raises(moescope.MoescopeError):
        ONCE[name](moescope.Client("http://moe", transport=httpx.MockTransport(script)))
    with pytest.raises(moescope.MoescopeError):
        asyncio.run(called(ONCE[name], script))
    assert len(script.asked) == 2


def test_who_wants_no_retries_has_none():
    script = Script(DOWN)
    moe = moescope.Client("http://moe", transport=httpx.MockTransport(script), retries=0)
    with pytest.raises(CollectorDownError):
        moe.info()
    assert len(script.asked) == 1
