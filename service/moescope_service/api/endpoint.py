"""What happens to a request before its endpoint: who sent it, how large it is, what is wrong."""

from __future__ import annotations

import reprlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Annotated, Any

import msgspec
from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from moescope_service.api.auth import keys_of
from moescope_service.api.responses import error_response
from moescope_service.errors import CollectorGoneError
from moescope_service.parsers import shown

MAX_BODY_BYTES = 2**20
"""Of a request: 1,024 ids of 512 characters fit in."""
OPEN_PATHS = frozenset({"/metrics", "/moescope", "/moescope/page/{name}"})
"""Endpoints of ours that are no `MoescopeRoute`: anyone may ask them, and from any page."""

_MAX_ERRORS, _MAX_PLACE_CHARS = 5, 80
"""What a message says of bad parameters: a list of thousands can be bad in every item."""
_MAX_KEYS = 1024
"""Of an object in a body: each one that is not allowed costs an error of its own."""

_Scalar = str | int | float | bool | None
_Numbers = Annotated[dict[str, int], msgspec.Meta(max_length=_MAX_KEYS)]
_Flat = Annotated[dict[str, _Scalar | list[_Scalar] | _Numbers], msgspec.Meta(max_length=_MAX_KEYS)]
_flat = msgspec.json.Decoder(_Flat)
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 200
_shown.maxlong = 40
_shown.fillvalue = "…"


class MoescopeRoute(APIRoute):
    """Lets nobody in who has no key, or whose browser shows another site's page; then reads.

    FastAPI reads and parses a body before any dependency runs: what is to be said of a request
    without its body is said here, so that an unknown sender costs nothing.

    A bad parameter is answered 422, and 503 where there is no collector; vLLM's app would say 400
    and 500. The message names the parameter, what was received and what is allowed.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; one of another method is told so as any other error is."""
        if scope["method"] not in self.methods:
            same_path = [
                one for one in scope["app"].routes if getattr(one, "path", "") == self.path
            ]
            allowed = ", ".join(sorted({method for one in same_path for method in one.methods}))
            message = f"{shown(scope['path'])} takes {allowed}, not {scope['method']}"
            error = HTTPException(405, message, {"Allow": allowed})
            response = await error_response(Request(scope, receive), error)
            await response(scope, receive, send)
            return
        await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler that FastAPI made."""
        handle = super().get_route_handler()

        async def check_and_handle(request: Request) -> Response:
            keys_of(request).check(request.headers)
            request.app.state.moescope_browsers.check(request.headers)
            try:
                return await handle(_BoundedRequest(request.scope, request.receive))
            except RequestValidationError as error:
                errors = error.errors()[:_MAX_ERRORS]
                raise HTTPException(422, "; ".join(map(_describe, errors))) from None
            except CollectorGoneError as error:
                raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
            except ClientDisconnect:  # to be read by no one; vLLM's app would log a traceback
                return Response(status_code=499)

        async def answer(request: Request) -> Response:
            try:
                return await check_and_handle(request)
            except HTTPException as error:
                return await error_response(request, error)

        return answer


class _BoundedRequest(Request):
    """A request whose body is small and flat, or refused as soon as that is known."""

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the body, however it is sent, up to `MAX_BODY_BYTES`.

        Raises:
            HTTPException: 413, it is larger.
        """
        size_bytes = int(self.headers.get("content-length", "0"))
        _check_size(size_bytes)
        size_bytes = 0
        async for chunk in super().stream():
            size_bytes += len(chunk)
            _check_size(size_bytes)
            yield chunk

    async def json(self) -> Any:
        """Return the body's object: scalars, lists of them, and numbers by name.

        Parsing ends at the first list or object that is too deep: a body of 300,000 empty lists
        holds the event loop no longer than a short one.

        Raises:
            HTTPException: 422, the body is no such object.
        """
        try:
            return _flat.decode(await self.body())
        except msgspec.ValidationError as error:
            raise HTTPException(422, f"body: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HTTPException(422, f"body: it must be JSON: {error}") from None


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_BODY_BYTES:
        raise HTTPException(
            413,
            f"body: expected at most {MAX_BODY_BYTES:,} bytes, got {size_bytes:,} or more: ask for "
            "fewer ids at a time",
        )


def _describe(error: Any) -> str:
    place, *inside = error["loc"]  # such as ("query", "layers") and ("body", "request_ids", 3)
    name = ".".join(map(str, inside))[:_MAX_PLACE_CHARS] or place
    return f"{name}: {error['msg']}, got {_shown.repr(error.get('input'))}"
