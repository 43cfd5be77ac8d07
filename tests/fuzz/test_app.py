"""Whatever is sent to the real app: a clear answer, in bounds of time and memory."""

from __future__ import annotations

import time
from urllib.parse import quote

import httpx
import orjson
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope import Client
from tests.waiting import wait_until

from .profile import fuzzed, unit_s

MIB = 2**20
UNITS = 60
"""How much time of the event loop's thread one request may take, in units: see `unit_s`."""
ANSWERS = {200, 202, 307, 400, 401, 403, 404, 405, 409, 410, 413, 415, 422}
"""What the app may answer; everything that is bad is the client's fault."""

ids = st.sampled_from(["cmpl-known-0", "cmpl-known-1", "known-2", "running", "x", ""]) | st.text(
    max_size=600
)
numbers = st.integers() | st.integers(-3, 70) | st.floats() | st.booleans() | st.none()
words = st.sampled_from(
    ["json", "jsonl", "npz", "npy", "arrow", "parquet", "0,5-7", "1,3", "all", "prefill", "true"]
)
values = numbers | words | st.text(max_size=50)
names = st.sampled_from(
    ["format", "layers", "index", "weights", "wait_s", "start", "limit", "before", "phase",
     "window_s"]
) | st.text(max_size=10)  # fmt: skip
queries = st.lists(st.tuples(names, values), max_size=6)
headers = st.fixed_dictionaries(
    {},
    optional={
        "Accept-Encoding": st.sampled_from(["gzip", "gzip;q=0", "*", "br;q=x", ",,;;", "identity"]),
        "Content-Type": st.sampled_from(["application/json", "text/plain", "x"]),
        "Origin": st.sampled_from(["null", "http://evil.example", "http://127.0.0.1", "\t"]),
        "Sec-Fetch-Site": st.sampled_from(["cross-site", "same-origin", "none", "?"]),
        "Authorization": st.sampled_from(["Bearer", "Bearer x", "Basic Og==", ""]),
        "Range": st.just("bytes=0-1"),
        "X-Request-Id": st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20),
    },
)  # fmt: skip
methods = st.sampled_from(["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH"])
json_values = st.recursive(
    values, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(names, inner, max_size=5)
)
batches = st.fixed_dictionaries(
    {"request_ids": st.lists(ids, max_size=8) | json_values},
    optional={
        "format": values,
        "start": numbers | st.dictionaries(ids, numbers, max_size=5) | json_values,
        "limit": values,
        "layers": values,
        "weights": values,
        "wait_s": st.sampled_from([0, 0.01, -1, 61, "x", None]),
        "more": json_values,
    },
)
paths = st.one_of(
    ids.map(lambda one: f"/routes/{quote(one, safe='')}"),
    ids.map(lambda one: f"/routes/{quote(one, safe='/')}"),
    st.sampled_from(
        ["/routes", "/routes/", "/routes/batch", "/routes/pause", "/routes/resume",
         "/routes/reset", "/experts", "/moescope/info", "/metrics", "/routes/%00", "/routes/%ff"]
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served.deployment.url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def ask(served, http):
    """Send a request, and hold its answer to the bounds."""
    clock, unit = time.pthread_getcpuclockid(served.thread.ident), unit_s()

    def ask(method, path, **options):
        before_s = time.clock_gettime(clock)
        try:
            answer = http.request(method, path, **options)
        except httpx.LocalProtocolError:
            return None  # the client's own library does not send it
        spent_s = time.clock_gettime(clock) - before_s
        assert spent_s < UNITS * unit, f"{spent_s:.3f} s of the event loop's thread"
        check(answer)
        return answer

    def check(answer):
        assert answer.status_code in ANSWERS, answer.text[:500]
        assert len(answer.content) < 2 * MIB  # a body of 1 MiB of ids says all of them again
        if answer.status_code >= 400 and answer.request.method != "HEAD" and answer.content:
            assert len(answer.content) < 4096, answer.text[:500]
            message = orjson.loads(answer.content)
            assert message.get("error", message.get("detail")), message

    return ask


@pytest.fixture(scope="module", autouse=True)
def _unharmed(served):
    """Afterwards the app and its collector serve as before, and hold no more than before."""
    collector = psutil.Process(served.deployment.collector.pid)
    own, before = psutil.Process().memory_info().rss, collector.memory_info().rss
    yield
    deployment = served.deployment
    responses = deployment.app.state.moescope_responses
    wait_until(
        lambda: (responses.budget.used_bytes, responses.num_making) == (0, 0), "all bytes are free"
    )
    wait_until(lambda: not deployment.app.state.moescope_collector._open, "no query is open")
    assert psutil.Process().memory_info().rss - own < 256 * MIB
    assert collector.memory_info().rss - before < 32 * MIB
    deployment.http.post("/routes/resume")
    deployment.complete("afterwards")
    with Client(deployment.url) as client:
        assert client.routes("cmpl-afterwards", wait_s=10)[0].complete
    assert deployment.collector.poll() is None


@fuzzed
@given(methods, paths, queries, headers)
def test_any_request(ask, method, path, query, headers):
    if ("wait_s", 60.0) in query or method == "GET":  # nobody waits a minute here
        query = [(n, v if n != "wait_s" else 0.01) for n, v in query]
    ask(method, path, params=[(n, _text(v)) for n, v in query], headers=headers)


@fuzzed
@given(batches | json_values, headers)
def test_any_body_of_json(ask, body, headers):
    content = orjson.dumps(
        body, option=orjson.OPT_NON_STR_KEYS, default=str
    ) if _is_json(body) else repr(body).encode()  # fmt: skip
    ask("POST", "/routes/batch", content=content, headers=headers)


@fuzzed
@given(st.binary(max_size=3000), headers)
def test_any_bytes(ask, content, headers):
    ask("POST", "/routes/batch", content=content, headers=headers)


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("nesting", b"[" * 500_000),
        ("empty lists", b"[" + b"[]," * 300_000 + b"[]]"),
        ("keys", b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b"}"),
        ("starts", b'{"request_ids":["x"],"start":{'
         + b",".join(b'"%d":-1' % n for n in range(90_000)) + b"}}"),
        ("long ids", orjson.dumps({"request_ids": ["x" * 1000 + str(n) for n in range(1000)]})),
        ("a long number", b'{"request_ids":["x"],"start":' + b"9" * 900_000 + b"}"),
        ("a long string", b'{"request_ids":["x"],"layers":"' + b"1," * 450_000 + b'"}'),
        ("empty ids", orjson.dumps({"request_ids": [""] * 1024})),
        ("wrong ids", orjson.dumps({"request_ids": [[1]] * 200_000})),
        ("one id again and again", orjson.dumps({"request_ids": ["cmpl-known-1"] * 1024})),
        ("too large", b"x" * 30 * MIB),
    ],
)  # fmt: skip
def test_bodies_that_cost_much(ask, what, content):
    ask("POST", "/routes/batch", content=content, headers={"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def paged(served, http):
    """A request of eight tokens that no example deletes; one before may have paused the capture."""
    assert http.post("/routes/resume").status_code == 200
    served.deployment.complete("paged")
    return "cmpl-paged"


@pytest.mark.parametrize("form", ["json", "jsonl", "npz", "npy", "arrow", "parquet"])
@pytest.mark.parametrize("start", [0, 6, 7, 8, 9, 2**31 - 1])
@pytest.mark.parametrize("limit", [None, 1, 2**31 - 1])
def test_every_page_of_every_format(ask, paged, form, start, limit):
    params = {"format": form, "start": start} | ({} if limit is None else {"limit": limit})
    assert ask("GET", f"/routes/{paged}", params=params).status_code == 200


def _text(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_json(value):
    try:
        orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
    except (TypeError, ValueError):
        return False
    return True
