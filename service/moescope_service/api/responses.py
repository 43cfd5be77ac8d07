"""How the endpoints answer: bodies made off the event loop, compressed where wanted; errors."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import HTTPException, Request, Response
from isal import igzip
from starlette.concurrency import run_in_threadpool

from moescope_service.api.accept import takes_gzip
from moescope_service.api.sharing import MadeBody

_GZIP_FROM_BYTES = 1024
_GZIP_LEVEL = 1
"""ISA-L's: JSON becomes smaller than with zlib's first, in a quarter of the time."""
_COMPRESSED = frozenset({"json", "jsonl"})
"""Arrays of ids and weights would shrink by a fifth, and fetching them take twice as long."""

NEXT_START = "X-Moescope-Next-Start"
"""Header of a response that has a page of rows: the first row of the next one."""

MEDIA_TYPES = {
    "json": "application/json",
    "jsonl": "application/jsonl",
    "npz": "application/x-npz",
    "npy": "application/x-npy",
    "arrow": "application/vnd.apache.arrow.stream",
    "parquet": "application/vnd.apache.parquet",
}


async def error_response(request: Request, error: HTTPException) -> Response:
    """Return an error as vLLM's app does, ``{"error": {"message", "type", "param", "code"}}``.

    Its headers, such as ``Retry-After``, are sent; vLLM's app (0.32.0,
    ``entrypoints/serve/exception_handling/handlers/http.py``) would leave them out.
    """
    response: Response = await request.app.exception_handlers[HTTPException](request, error)
    response.headers.update(error.headers or {})
    return response


def wants_gzip(request: Request) -> bool:
    """Return whether the client of a request takes gzip."""
    return takes_gzip(",".join(request.headers.getlist("accept-encoding")))


def compressed(content: bytes, form: str, *, gzip: bool, next_start: int | None = None) -> MadeBody:
    """Return a body, compressed if it is text and its client takes gzip.

    Args:
        content: What it holds.
        form: A key of `MEDIA_TYPES`.
        gzip: Whether the client takes it.
        next_start: The first row that it leaves out, which a header tells too.
    """
    media_type = MEDIA_TYPES[form]
    headers = {} if next_start is None else {NEXT_START: str(next_start)}
    if form not in _COMPRESSED:
        return MadeBody(content, media_type, headers)
    headers["Vary"] = "Accept-Encoding"
    if not gzip or len(content) < _GZIP_FROM_BYTES:
        return MadeBody(content, media_type, headers)
    headers["Content-Encoding"] = "gzip"
    return MadeBody(igzip.compress(content, _GZIP_LEVEL), media_type, headers)


async def encoded(request: Request, form: str, make: Callable[[], bytes]) -> Response:
    """Make a small body in a thread, and compress it if it is text and the client takes gzip.

    Args:
        request: Whose ``Accept-Encoding`` counts.
        form: A key of `MEDIA_TYPES`.
        make: Makes the body.
    """
    gzip = wants_gzip(request)
    body = await run_in_threadpool(lambda: compressed(make(), form, gzip=gzip))
    return Response(body.content, headers=dict(body.headers), media_type=body.media_type)
