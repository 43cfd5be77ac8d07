"""Tells the collector which sequence of the engine belongs to which request of a client.

The ids that a client sees are not those that the engine uses (``cmpl-X`` and ``cmpl-X-0-3f9a…``,
``resp_X``, a raw ``X-Request-Id``), and none of them is ever parsed: `RequestScopeMiddleware` keeps
the HTTP request at hand, and the wrapped ``add_request`` reads both sides where they meet.

Relies on vLLM 0.32.0, ``v1/engine/output_processor.py`` (``OutputProcessor.add_request``;
``RequestState.make_request_output``, called for every finished sequence, and for aborted ones where
a queue waits for their output, as in a server; ``OutputProcessor.abort_requests``, which returns
the ids of all aborted ones) and ``entrypoints`` (``request.state.request_metadata.request_id`` is
the id in the response).
"""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moescope_service.api.collector_client import CollectorClient
from moescope_service.messages import Register

HEADER = "x-moescope"
"""Request header: ``off`` keeps no routes of the request, ``on`` keeps them."""
XARG = "moescope"
"""The same as an entry of ``vllm_xargs`` in the request's body."""


MAX_ID_CHARS = 512
"""Longer ids find nothing: they come from clients, and the store is bounded."""


def parse_wish(text: str | None) -> bool | None:
    """Return whether a request wants its routes kept; None where it does not say.

    Raises:
        ValueError: The text is neither ``on`` nor ``off``.
    """
    if text is None:
        return None
    if text.lower() not in {"on", "off"}:
        raise ValueError(f"{text!r} is not one of on, off")
    return text.lower() == "on"


def is_sampled(request_id: str, share: float) -> bool:
    """Return whether a request is one of the share whose routes are kept.

    The id alone decides: every choice of a request is kept or none is, in every API server.
    """
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


@dataclasses.dataclass(slots=True)
class RequestScope:
    """The HTTP request that is being handled."""

    scope: Scope
    created_s: float
    internal_ids: list[str] = dataclasses.field(default_factory=list)
    """The engine's sequences that belong to it."""
    header_id: str | None = None
    """The ``X-Request-Id`` of the response, once its headers are sent."""

    @property
    def headers(self) -> Headers:
        """The request's headers."""
        return Headers(scope=self.scope)

    @property
    def response_id(self) -> str | None:
        """The id in the response, once vLLM has chosen it."""
        metadata = self.scope.get("state", {}).get("request_metadata")
        return None if metadata is None else metadata.request_id


_current: contextvars.ContextVar[RequestScope | None] = contextvars.ContextVar(
    "moescope_request", default=None
)


class RequestScopeMiddleware:
    """Keeps the HTTP request where `Registration` finds it (pure ASGI)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; see the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = RequestScope(scope, time.time())
        try:
            parse_wish(request.headers.get(HEADER))
        except ValueError as error:
            message = f"the header X-Moescope: {error}"
            response = JSONResponse({"error": {"message": message, "code": 422}}, 422)
            await response(scope, receive, send)
            return
        _current.set(request)

        async def send_and_look(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                # Outer middleware has added its headers by now, to this very list.
                request.header_id = Headers(raw=message["headers"]).get("x-request-id")
                registration = getattr(scope["app"].state, "moescope_registration", None)
                if registration is not None:
                    registration.add_header_id(request)

        await self._app(scope, receive, send_and_look)


class Registration:
    """Registers each sequence at the collector and reports its end.

    Everything runs in the API server's event loop and costs one small message a request.

    Args:
        collector: Where to tell.
        model: The served model's name.
        kept_share: Share of the requests that say nothing whose routes are kept, 0 to 1.
    """

    def __init__(self, collector: CollectorClient, *, model: str, kept_share: float) -> None:
        self._collector = collector
        self._model = model
        self._kept_share = kept_share
        self._running: dict[str, Any] = {}  # vLLM's RequestState by internal id

    def watch(self, output_processor: Any) -> None:
        """Wrap an output processor's ``add_request`` and ``abort_requests`` (this instance's)."""
        add_request = output_processor.add_request
        abort_requests = output_processor.abort_requests

        def add_and_register(
            request: Any,
            prompt: str | None,
            parent_req: Any = None,
            request_index: int = 0,
            queue: Any = None,
        ) -> None:
            is_update = output_processor.has_request(request.request_id)
            keep = self._keeps(request, parent_req)  # before the engine has it: it may be refused
            add_request(request, prompt, parent_req, request_index, queue)
            if request.sampling_params is not None and not request.resumable and not is_update:
                state = output_processor.request_states[request.request_id]
                self._register(request, state, parent_req, request_index, keep=keep)
                self._watch_end(state)

        def abort_and_report(request_ids: Iterable[str], internal: bool) -> list[str]:
            aborted: list[str] = abort_requests(request_ids, internal)
            for internal_id in aborted:
                self._report_end(internal_id, "abort")
            return aborted

        output_processor.add_request = add_and_register
        output_processor.abort_requests = abort_and_report

    def add_header_id(self, request: RequestScope) -> None:
        """Let the response's ``X-Request-Id`` find a request that is registered already.

        A stream's headers are sent before its request reaches the engine: `_register` adds it.
        """
        header_id = request.header_id
        if header_id is not None and len(header_id) <= MAX_ID_CHARS and request.internal_ids:
            self._collector.tell("alias", internal_ids=request.internal_ids, alias=header_id)

    def _register(self, request: Any, state: Any, parent: Any, sample: int, *, keep: bool) -> None:
        http = _current.get()
        external_id, response_id = _ids(http, request, parent)
        ids = {response_id, external_id, request.request_id}
        if http is not None:
            http.internal_ids.append(request.request_id)
            ids |= {http.headers.get("x-request-id", response_id), http.header_id or response_id}
        samples = parent.sampling_params.n if parent else 1
        register = Register(
            internal_id=request.request_id,
            request_id=response_id,
            ids=sorted(one for one in ids if len(one) <= MAX_ID_CHARS),
            index=prompt_number(external_id, response_id) * samples + sample,
            model=self._model,
            lora=state.lora_name,
            prompt_len=state.prompt_len,
            created_s=http.created_s if http else request.arrival_time,
            keep=keep,
        )
        prompt_ids = state.prompt_token_ids
        arrays = [] if prompt_ids is None else [np.array(prompt_ids, np.int32)]
        self._collector.tell("register", arrays, **dataclasses.asdict(register))

    def _keeps(self, request: Any, parent: Any) -> bool:
        http = _current.get()
        wish = parse_wish(http.headers.get(HEADER)) if http is not None else None
        extra = (request.sampling_params and request.sampling_params.extra_args) or {}
        if XARG in extra:
            try:
                wish = parse_wish(str(extra[XARG]))
            except ValueError as error:
                raise ValueError(f"vllm_xargs.{XARG}: {error}") from None
        if wish is not None:
            return wish
        _, response_id = _ids(http, request, parent)
        return is_sampled(response_id, self._kept_share)

    def _watch_end(self, state: Any) -> None:
        make_request_output = state.make_request_output

        def make_and_report(
            new_token_ids: list[int], pooling_output: Any, finish_reason: Any, *args: Any, **kw: Any
        ) -> Any:
            if finish_reason is not None:
                self._report_end(state.request_id, str(finish_reason))
            return make_request_output(new_token_ids, pooling_output, finish_reason, *args, **kw)

        state.make_request_output = make_and_report
        self._running[state.request_id] = state

    def _report_end(self, internal_id: str, reason: str) -> None:
        """Tell how a sequence ended, unless that was told or it is none of ours."""
        state = self._running.pop(internal_id, None)
        if state is not None:
            del state.make_request_output  # ends the cycle through its closure
            output_ids = np.array(state.detokenizer.output_token_ids, np.int32)
            self._collector.tell("finish", [output_ids], internal_id=internal_id, reason=reason)


def _ids(http: RequestScope | None, request: Any, parent: Any) -> tuple[str, str]:
    """Return the engine's external id, and the id in the response: one for all its sequences."""
    external_id: str = parent.external_req_id if parent else request.external_req_id
    return external_id, (http and http.response_id) or external_id


def prompt_number(external_id: str, response_id: str) -> int:
    """Return which prompt of a request the engine's id means.

    vLLM appends ``-0``, ``-1`` … (completions) or ``_0``, ``_1`` … (chat batches, responses) to the
    response's id, which is known here: nothing is guessed from the id alone.
    """
    for separator in "-_":
        number = external_id.removeprefix(response_id + separator)
        if number != external_id and number.isdecimal():
            return int(number)
    return 0
