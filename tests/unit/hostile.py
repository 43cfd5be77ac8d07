"""A hostile server in memory, and JSON that is not what it was."""

from __future__ import annotations

import contextlib
import io
import itertools
import tracemalloc

import httpx
import numpy as np
import orjson
from client_fakes import make_trace
from hypothesis import strategies as st

from moescope import Client, formats
from tests.examples import made_up

CAP = 2**20
DEEP = b"[" * 900 + b"]" * 900
checked = made_up(40)


class Stream(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The parts of a body; counts those that were taken."""

    def __init__(self, *parts, endless=False):
        self._parts = itertools.cycle(parts) if endless else iter(parts)
        self.taken = 0

    def __iter__(self):
        for part in self._parts:
            self.taken += 1
            yield part

    async def __aiter__(self):
        for part in self:
            yield part


def client(answer, **kwargs):
    """A client of a server that answers everything alike."""
    handle = answer if callable(answer) else lambda _: answer
    served = httpx.MockTransport(handle)
    return Client("http://moe", transport=served, max_bytes=CAP, retries=0, **kwargs)


def streamed(*parts, status=200, endless=False, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=names, stream=Stream(*parts, endless=endless))


@contextlib.contextmanager
def bounded(factor, cap=CAP):
    """Check the memory that is taken meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < factor * cap
    finally:
        tracemalloc.stop()


NASTY = st.sampled_from([
    None, True, -1, 0, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, 1e308, "", "\x1b[2J", "é…", "5",
    [], {}, [[]], [None], {"a": {}}, ["x"] * 3, [-1], [2**64 - 1], [0.5], [[1], [1, 2]],
    orjson.loads(DEEP[:100] + DEEP[-100:]),
])  # fmt: skip


def places(values, path=()):
    """Yield the path of every value within JSON."""
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for name, value in items:
        if isinstance(value, dict | list):
            yield from places(value, (*path, name))
        else:
            yield (*path, name)


def mutated(data, values, times=2):
    """Return a copy in which some values were left out, added or replaced."""
    for _ in range(times):
        values = orjson.loads(orjson.dumps(values))
        paths = list(places(values)) if isinstance(values, dict | list) else [()]
        *path, last = data.draw(st.sampled_from(paths)) or [None]
        if last is None:
            continue
        parent = values
        for name in path:
            parent = parent[name]
        if data.draw(st.booleans()):
            parent[last] = data.draw(NASTY)
        else:
            del parent[last]
    return values


def npz(arrays, deflate=False):
    buffer = io.BytesIO()
    (np.savez_compressed if deflate else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def arrays_of(*traces, **more):
    return {**formats.arrays_of(traces or [make_trace(), make_trace(1)]), **more}


def use(traces):
    """Do what users do with traces."""
    for trace in traces:
        trace.counts()
        trace.entropy_bits()
        trace.top_experts()
        list(formats.route_lines(trace))
        formats.dump_npz([trace])
        formats.dump_json("x", [trace])
        if trace.complete:
            formats.dump_npy(trace)
