"""AsyncClient is Client for asyncio; several threads may use one Client."""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import orjson
import pytest
from client_fakes import INFO, make_trace, same

import moescope
from moescope import AsyncClient, Client, batch, formats

LIMIT = 5
SEQUENCE = {
    "request_id": "x", "ids": ["x", "y"], "index": 0, "status": "finished", "prompt_len": 3,
    "num_tokens": 9, "finish_reason": "stop", "complete": True, "coverage": 1.0, "created_s": 1.0,
    "size_bytes": 10,
}  # fmt: skip
TRACES = {f"r{n}": make_trace(n, num_rows=n, request_id=f"r{n}") for n in range(16)}


def answer(method: str, target: str, content: bytes) -> tuple[int, bytes]:
    """What the server answers: traces in pages of five rows, a list in pages of two sequences."""
    url = httpx.URL(target)
    if url.path == "/routes/batch":
        asked = orjson.loads(content)
        starts = asked.get("start", {})
        pages = {one: page(one, starts.get(one, 0)) for one in asked["request_ids"]}
        return 200, batch.dump_npz(batch.RoutesBatch(
            status=dict.fromkeys(pages, "finished"),
            traces={one: [trace] for one, (trace, _) in pages.items()},
            next_start={one: start for one, (_, start) in pages.items() if start is not None},
        ))  # fmt: skip
    if url.path == "/routes":
        before = int(url.params.get("before", 5))
        numbers = range(before - 1, max(before - 3, -1), -1)
        sequences = [{**SEQUENCE, "request_id": f"r{number}"} for number in numbers]
        next_before = numbers[-1] or None
        return 200, orjson.dumps({"sequences": sequences, "next_before": next_before})
    fixed = {
        ("GET", "/moescope/info"): INFO,
        ("POST", "/routes/pause"): {"capture": "paused"},
        ("POST", "/routes/resume"): {"capture": "on"},
        ("POST", "/routes/reset"): {"since_s": 12.5},
        ("DELETE", "/routes/r3"): {"deleted": 2},
        ("GET", "/experts"): {
            "model": "demo", "phase": url.params.get("phase"), "since_s": 5.0, "num_rows": 3,
            "num_experts": 3, "layers": [0, 4], "counts": [[1, 2, 0], [0, 0, 3]],
        },
    }  # fmt: skip
    if (method, url.path) in fixed:
        return 200, orjson.dumps(fixed[method, url.path])
    request_id = url.path.removeprefix("/routes/")
    if request_id not in TRACES:
        return 404, b'{"detail": "never recorded"}'
    trace, next_start = page(request_id, int(url.params.get("start", 0)))
    return 200, formats.dump_npz([trace], next_start=next_start)


def page(request_id, start):
    trace = TRACES[request_id]
    return trace.page(start, LIMIT), start + LIMIT if trace.num_rows > start + LIMIT else None


def transport():
    def handle(request):
        status, body = answer(request.method, str(request.url), request.content)
        return httpx.Response(status, content=body)

    return httpx.MockTransport(handle)


CALLS = {
    "routes": lambda moe: moe.routes("r12"),
    "routes, from a row on": lambda moe: moe.routes("r12", start=7, layers=[0], weights=False),
    "routes, unknown": lambda moe: moe.routes("unknown"),
    "routes, no id": lambda moe: moe.routes(""),
    "routes_batch": lambda moe: moe.routes_batch(["r0", "r12", "r7"]),
    "recent": lambda moe: moe.recent(2),
    "experts": lambda moe: moe.experts("decode"),
    "info": lambda moe: moe.info(),
    "delete": lambda moe: moe.delete("r3"),
    "delete, unknown": lambda moe: moe.delete("unknown"),
    "pause": lambda moe: moe.pause(),
    "resume": lambda moe: moe.resume(),
    "reset": lambda moe: moe.reset(),
}


async def in_tasks(call):
    async with AsyncClient("http://moe", transport=transport()) as moe:
        return await asyncio.gather(*[call(moe) for _ in range(3)])


def outcome(call):
    """What a call of `Client` finds, or its error."""
    with Client("http://moe", transport=transport()) as moe:
        try:
            return call(moe)
        except (moescope.MoescopeError, ValueError) as error:
            return error


def plain(found):
    """A result as what can be compared."""
    if isinstance(found, moescope.RouteTrace):
        return formats.dump_npz([found])
    if isinstance(found, list):
        return [plain(one) for one in found]
    if isinstance(found, moescope.RoutesBatch):
        return found.status, {one: plain(traces) for one, traces in found.traces.items()}
    return repr(found)


@pytest.mark.parametrize("name", CALLS)
def test_both_clients_find_the_same(name):
    call, expected = CALLS[name], outcome(CALLS[name])
    if isinstance(expected, Exception):
        with pytest.raises(type(expected), match=f"^{re.escape(str(expected))}$"):
            asyncio.run(in_tasks(call))
        return
    assert [plain(one) for one in asyncio.run(in_tasks(call))] == [plain(expected)] * 3


def test_both_clients_have_the_same_methods():
    def methods(kind):
        named = [name for name in vars(kind) if name == "__init__" or not name.startswith("_")]
        return {name: dict(inspect.signature(getattr(kind, name)).parameters) for name in named}

    ours, theirs = methods(Client), methods(AsyncClient)
    for one in (ours, theirs):
        del one["__init__"]["transport"]
    assert ours == theirs
    assert ours.keys() == {
        "__init__", "close", "delete", "experts", "follow", "info", "iter_recent", "label_weights",
        "pause", "recent", "reset", "resume", "routes", "routes_batch", "weights_label",
    }  # fmt: skip


def test_all_recent_sequences():
    async def collected():
        async with AsyncClient("http://moe", transport=transport()) as moe:
            return [one.request_id async for one in moe.iter_recent(page_size=2)]

    with Client("http://moe", transport=transport()) as moe:
        names = [one.request_id for one in moe.iter_recent(page_size=2)]
    assert names == ["r4", "r3", "r2", "r1", "r0"]
    assert asyncio.run(collected()) == names


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are used again

    def log_message(self, *args):
        pass

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        status, body = answer(self.command, self.path, self.rfile.read(length))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.do_GET()


class Server(ThreadingHTTPServer):
    daemon_threads = True


@pytest.fixture
def url():
    with Server(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_many_threads_with_one_client_get_each_their_own(url):
    with Client(url) as moe, ThreadPoolExecutor(4) as pool:
        start = threading.Barrier(4)

        def work(number):
            start.wait(60)
            for step in range(5):
                name = f"r{(number + step) % 16}"
                (trace,) = moe.routes(name)
                assert same(trace, TRACES[name])
                found = moe.routes_batch([name, "r1"])
                assert same(found.traces[name][0], TRACES[name])
                assert moe.info().model == "demo"
            return number

        assert list(pool.map(work, range(4))) == list(range(4))
