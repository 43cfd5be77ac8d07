"""Keeps the HTTP request that is being handled where registration finds it.

Relies on vLLM 0.32.0, ``entrypoints``: ``request.state.request_metadata.request_id`` is the id in
the response.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time

import msgspec
from fastapi import HTTPException, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moescope_service.api.auth import Keys
from moescope_service.api.responses import error_response
from moescope_service.frontend.registration import Registration, current_request, parse_wish
from moescope_service.ids import readings

HEADER = "x-moescope"
"""Request header: ``off`` keeps no routes of the request, ``on`` keeps them."""
_BODY_KEY = b'"request_id"'


class _Body(msgspec.Struct):
    request_id: str | None = None


_body = msgspec.json.Decoder(_Body)


@dataclasses.dataclass(slots=True)
class RequestScope:
    """An HTTP request; see `moescope_service.frontend.registration.ClientRequest`."""

    scope: Scope
    created_s: float
    wish: bool | None
    """What the header `HEADER` says."""
    internal_ids: list[str] = dataclasses.field(default_factory=list)
    header_id: str | None = None
    """The ``X-Request-Id`` of the response, once its headers are sent."""
    chunks: list[bytes] = dataclasses.field(default_factory=list)
    """The body as far as it is received, until `body_id` looks into it."""
    _body_id: str | None = None

    @property
    def response_id(self) -> str | None:
        """The id in the response, once vLLM has chosen it."""
        metadata = self.scope.get("state", {}).get("request_metadata")
        return None if metadata is None else metadata.request_id

    @property
    def owner(self) -> str | None:
        """Whose API key it sends; None where none of the server's."""
        keys: Keys = self.scope["app"].state.moescope_keys
        return keys.owner(Headers(scope=self.scope))

    @property
    def own_ids(self) -> list[str]:
        """The ``X-Request-Id`` of the request, that of the response once it is sent, `body_id`.

        And the response's id as a client expects it that sent an ``X-Request-Id`` in UTF-8.
        """
        sent = Headers(scope=self.scope).get("x-request-id")
        in_headers = [one for one in (sent, self.header_id, sent and self.response_id) if one]
        ids = [reading for one in in_headers for reading in readings(one)]
        return [*ids, *([self.body_id] if self.body_id else [])]

    @property
    def body_id(self) -> str | None:
        """The ``request_id`` in the body, which vLLM takes too.

        It is parsed only where the word is in it, and once: a body can be megabytes of prompts.
        """
        body = b"".join(self.chunks)
        self.chunks.clear()
        if _BODY_KEY in body:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeError):
                self._body_id = _body.decode(body).request_id
        return self._body_id


class RequestScopeMiddleware:
    """Sets `current_request` for every HTTP request (pure ASGI)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; see the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            wish = parse_wish(headers.get(HEADER))
        except ValueError as error:
            refusal = HTTPException(422, f"invalid header X-Moescope {error}")
            response = await error_response(Request(scope, receive), refusal)
            await response(scope, receive, send)
            return
        request = RequestScope(scope, time.time(), wish)
        current_request.set(request)
        registration: Registration | None = getattr(
            scope["app"].state, "moescope_registration", None
        )
        keeps_body = registration is not None and "json" in headers.get("content-type", "")

        async def receive_and_keep() -> Message:
            message = await receive()
            if keeps_body and message.get("body"):
                request.chunks.append(message["body"])
            return message

        async def send_and_look(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                # Outer middleware has added its headers by now, to this very list.
                request.header_id = Headers(raw=message["headers"]).get("x-request-id")
                # A stream's headers are sent before its request reaches the engine: registration
                # then finds the id in `own_ids`.
                if registration is not None and request.header_id is not None:
                    for one in readings(request.header_id):
                        registration.add_id(request.internal_ids, one)

        await self._app(scope, receive_and_keep, send_and_look)
