"""A server on this machine that answers chats and keeps routes, and notes what was asked."""

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import orjson
from client_fakes import INFO, completion, make_trace

from moescope import formats
from tests.waiting import DEADLINE_S

ROWS = 12


class MoeServer(ThreadingHTTPServer):
    """Answers every prompt but ``bad``; keeps the traces of all requests, or of the last few.

    Attributes:
        info: What ``/moescope/info`` answers; 404 where None.
        room: How many traces are kept; all where None.
        asked: The prompts, in the order of their requests.
        fetched: The request ids whose routes were asked for.
        texts: What each of them said of ``tokens``.
        held: Prompts that are answered once `go_on` is set.
        holds_routes: Whether routes are answered once `go_on` is set.
        headers: Those of the last chat.
    """

    daemon_threads = True

    def __init__(self, *, room: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.info: dict | None = dict(INFO)
        self.room = room
        self.asked: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str | None] = []
        self.held: set[str] = set()
        self.holds_routes = False
        self.go_on = threading.Event()
        self.headers: dict[str, str] = {}
        self.traces: dict = {}
        self.numbers = itertools.count()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: MoeServer

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: object) -> None:
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        with contextlib.suppress(ConnectionError):  # who asked is gone
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def fail(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"message": message}})

    def do_GET(self) -> None:
        url = httpx.URL(self.path)
        if url.path == "/v1/models":
            self.answer(200, {"data": [{"id": "demo"}]})
        elif url.path == "/moescope/info" and self.server.info:
            self.answer(200, self.server.info)
        elif url.path.startswith("/routes/"):
            self.answer_routes(url)
        else:
            self.fail(404, "Not Found")

    def answer_routes(self, url: httpx.URL) -> None:
        server, request_id = self.server, url.path.removeprefix("/routes/")
        server.fetched.append(request_id)
        server.texts.append(url.params.get("tokens"))
        if server.holds_routes:
            server.go_on.wait(DEADLINE_S)
        trace = server.traces.get(request_id)
        if trace is None:
            self.fail(410, f"the trace of {request_id} made room for newer ones")
            return
        if layers := url.params.get("layers"):
            trace = trace.select(layers=[int(layer) for layer in layers.split(",")])
        if not url.params.get("tokens"):
            trace = dataclasses.replace(trace, tokens=None)
        self.answer(200, formats.dump_npz([trace]))

    def do_POST(self) -> None:
        server = self.server
        asked = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][0]["content"]
        server.headers = {name.lower(): value for name, value in self.headers.items()}
        server.asked.append(prompt)
        if prompt in server.held:
            server.go_on.wait(DEADLINE_S)
        if prompt == "bad":
            self.fail(400, "refused")
            return
        number = next(server.numbers)  # several are asked at once
        values = completion(prompt, number)
        trace = make_trace(number, num_rows=ROWS, request_id=values["id"], tokens=True)
        server.traces[values["id"]] = trace
        for old in [*server.traces][: -server.room if server.room else 0]:
            del server.traces[old]
        self.answer(200, values)


@contextlib.contextmanager
def serving(**options: int) -> Iterator[MoeServer]:
    """Run a server on a thread of its own."""
    with MoeServer(**options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join()
