"""Tells the collector which sequence of the engine belongs to which request of a client.

The ids that a client sees are not those that the engine uses (``cmpl-X`` and ``cmpl-X-0-3f9a…``,
``resp_X``, a raw ``X-Request-Id``), and none of them is ever parsed: a server keeps the request at
hand (`current_request`), and the wrapped ``add_request`` reads both sides where they meet.

Relies on vLLM 0.32.0, ``v1/engine/output_processor.py`` (``OutputProcessor.add_request``;
``RequestState.make_request_output``, called for every finished sequence, and for aborted ones where
a queue waits for their output, as in a server; ``OutputProcessor.abort_requests``, which returns
the ids of all aborted ones; ``OutputProcessor._finish_request``, which alone is called for a
request that a paused engine of vLLM 0.33 rejects).
"""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from moescope.version_runs import LabelSpan
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.ids import short_id
from moescope_service.messages import Register
from moescope_service.parsers import parse_on_off, shown

UNLABELED = "default"
"""vLLM's label of weights that nobody has labeled."""
XARG = "moescope"
"""Entry of ``vllm_xargs`` in a request's body, or of ``SamplingParams.extra_args``: ``off`` keeps
no routes of the request, ``on`` keeps them."""


def parse_wish(text: str | None) -> bool | None:
    """Return whether a request wants its routes kept; None where it does not say.

    Raises:
        ValueError: The text is neither ``on`` nor ``off``.
    """
    if text is None:
        return None
    try:
        return parse_on_off(text.lower())
    except ValueError as error:
        raise ValueError(f"{shown(text)}: {error}") from None


def is_sampled(request_id: str, share: float) -> bool:
    """Return whether a request is one of the share whose routes are kept.

    The id alone decides: every choice of a request is kept or none is, in every API server.
    """
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


class ClientRequest(Protocol):
    """The request of a client that is being handled, as far as registration needs it."""

    created_s: float
    """Unix time at which it came, in seconds."""
    internal_ids: list[str]
    """The engine's sequences that belong to it, their ids shortened; registration fills them in."""

    @property
    def wish(self) -> bool | None:
        """Whether it wants its routes kept; None where it does not say."""

    @property
    def response_id(self) -> str | None:
        """The id in the response, once vLLM has chosen it."""

    @property
    def owner(self) -> str | None:
        """Whose API key it sends; see `moescope_service.messages.Register`."""

    @property
    def own_ids(self) -> Iterable[str]:
        """The ids that its client chose or has seen by now, beside that in the response."""


current_request: contextvars.ContextVar[ClientRequest | None] = contextvars.ContextVar(
    "moescope_request", default=None
)
"""None where no client is served: offline."""


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
        """Wrap methods of an output processor (this instance's): where requests come and end."""
        add_request = output_processor.add_request
        abort_requests = output_processor.abort_requests
        finish_request = output_processor._finish_request

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

        def finish_and_report(req_state: Any) -> None:
            finish_request(req_state)
            self._report_end(req_state.request_id, "error")  # unless its output told another end

        output_processor.add_request = add_and_register
        output_processor.abort_requests = abort_and_report
        output_processor._finish_request = finish_and_report

    def add_id(self, internal_ids: Sequence[str], request_id: str) -> None:
        """Let one more id find sequences that are registered already."""
        if internal_ids:
            self._collector.tell("alias", internal_ids=internal_ids, alias=short_id(request_id))

    def _register(self, request: Any, state: Any, parent: Any, sample: int, *, keep: bool) -> None:
        client = current_request.get()
        external_id, response_id = _ids(client, request, parent)
        internal_id = short_id(request.request_id)
        ids = {response_id, external_id, internal_id}
        if client is not None:
            client.internal_ids.append(internal_id)
            ids.update(client.own_ids)
        samples = parent.sampling_params.n if parent else 1
        register = Register(
            internal_id=internal_id,
            request_id=short_id(response_id),
            ids=sorted(set(map(short_id, ids))),
            index=prompt_number(external_id, response_id) * samples + sample,
            model=self._model,
            lora=state.lora_name,
            prompt_len=state.prompt_len,
            created_s=client.created_s if client else request.arrival_time,
            keep=keep,
            owner=client.owner if client else None,
        )
        prompt_ids = state.prompt_token_ids
        arrays = [] if prompt_ids is None else [np.array(prompt_ids, np.int32)]
        self._collector.tell("register", arrays, **dataclasses.asdict(register))

    def _keeps(self, request: Any, parent: Any) -> bool:
        client = current_request.get()
        wish = client.wish if client is not None else None
        extra = (request.sampling_params and request.sampling_params.extra_args) or {}
        if XARG in extra:
            try:
                wish = parse_wish(str(extra[XARG]))
            except ValueError as error:
                raise ValueError(f"invalid vllm_xargs.{XARG} {error}") from None
        if wish is not None:
            return wish
        _, response_id = _ids(client, request, parent)
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
            self._collector.tell(
                "finish",
                [output_ids],
                internal_id=short_id(internal_id),
                reason=reason,
                labels=weight_labels(state),
            )


def _ids(client: ClientRequest | None, request: Any, parent: Any) -> tuple[str, str]:
    """Return the engine's external id, and the id in the response: one for all its sequences."""
    external_id: str = parent.external_req_id if parent else request.external_req_id
    return external_id, (client and client.response_id) or external_id


def weight_labels(state: Any) -> list[LabelSpan]:
    """Return which weights sampled the tokens of a vLLM ``RequestState``, by their labels.

    Empty where nobody labeled them: vLLM then says ``default``. Until 0.31 it has no labels.
    """
    spans = state._weight_version_spans() if hasattr(state, "_weight_version_spans") else None
    labels = [
        LabelSpan(version=short_id(span.version), start=span.start, end=span.end)
        for span in spans or ()
    ]
    return labels if any(one["version"] != UNLABELED for one in labels) else []


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
