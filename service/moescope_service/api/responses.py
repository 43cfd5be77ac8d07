"""How the endpoints answer: clear errors, and bodies made off the event loop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from isal import igzip
from starlette.concurrency import run_in_threadpool

from moescope_service.errors import CollectorGoneError

_GZIP_FROM_BYTES = 1024
_GZIP_LEVEL = 1
"""ISA-L's: JSON becomes smaller than with zlib's first, in a quarter of the time."""
_COMPRESSED = frozenset({"json", "jsonl"})
"""Arrays of ids and weights would shrink by a fifth, and fetching them take twice as long."""
_MAX_ERRORS, _MAX_INPUT_CHARS = 5, 200
"""What a message says of bad parameters: a list of thousands can be bad in every item."""

MEDIA_TYPES = {
    "json": "application/json",
    "jsonl": "application/jsonl",
    "npz": "application/x-npz",
    "npy": "application/x-npy",
    "arrow": "application/vnd.apache.arrow.stream",
    "parquet": "application/vnd.apache.parquet",
}


class MoescopeRoute(APIRoute):
    """Answers 422 to a bad parameter and 503 without a collector; vLLM's app would say 400 and 500.

    The message names the parameter, what was received and what is allowed.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler that FastAPI made."""
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                errors = error.errors()[:_MAX_ERRORS]
                raise HTTPException(422, "; ".join(map(_describe, errors))) from None
            except CollectorGoneError as error:
                raise HTTPException(503, str(error)) from None

        return handle_errors


def _describe(error: Any) -> str:
    where, *inside = error["loc"]  # such as ("query", "layers") and ("body", "request_ids", 3)
    if error["type"] == "json_invalid":
        return f"{where}: {error['ctx']['error']} at character {inside[0]}: it must be JSON"
    got = repr(error.get("input"))
    if len(got) > _MAX_INPUT_CHARS:
        got = f"{got[:_MAX_INPUT_CHARS]}…"
    return f"{'.'.join(map(str, inside)) or where}: {error['msg']}, got {got}"


async def encoded(request: Request, form: str, make: Callable[[], bytes]) -> Response:
    """Make a body in a thread, and compress it if it is text and the client takes gzip.

    Args:
        request: Whose ``Accept-Encoding`` counts.
        form: A key of `MEDIA_TYPES`.
        make: Makes the body.
    """
    takes_gzip = "gzip" in request.headers.get("accept-encoding", "")

    def make_and_compress() -> tuple[bytes, dict[str, str]]:
        body = make()
        if form not in _COMPRESSED:
            return body, {}
        if not takes_gzip or len(body) < _GZIP_FROM_BYTES:
            return body, {"Vary": "Accept-Encoding"}
        headers = {"Vary": "Accept-Encoding", "Content-Encoding": "gzip"}
        return igzip.compress(body, _GZIP_LEVEL), headers

    body, headers = await run_in_threadpool(make_and_compress)
    return Response(body, media_type=MEDIA_TYPES[form], headers=headers)
