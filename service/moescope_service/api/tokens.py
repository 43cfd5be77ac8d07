"""The text of tokens in a response: whether there is a tokenizer, and how much text fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable

from fastapi import HTTPException, Request

from moescope_service.api.bodies import TEXT_BYTES, Format
from moescope_service.api.sharing import SharedResponses
from moescope_service.queries import RoutesQuery, RoutesReply
from moescope_service.token_text import TokenText

TOKENS = "Whether to return the text of the tokens."


def token_text_of(request: Request) -> TokenText | None:
    """Return what makes the text of tokens; None where the server has no tokenizer."""
    text: TokenText | None = request.app.state.moescope_token_text
    return text


def text_of(request: Request, *, is_wanted: bool) -> TokenText | None:
    """Return what makes the text of tokens; None where it is not wanted.

    Raises:
        HTTPException: 501, the server has no tokenizer.
    """
    text = token_text_of(request)
    if is_wanted and text is None:
        raise HTTPException(
            501, "tokens: this server has no tokenizer (--skip-tokenizer-init); leave tokens out"
        )
    return text if is_wanted else None


async def ask_for_rows(
    ask: Callable[[RoutesQuery], Awaitable[RoutesReply]],
    query: RoutesQuery,
    responses: SharedResponses,
    text: TokenText | None,
    form: Format,
    layers: tuple[int, ...] | None,
) -> RoutesReply:
    """Ask for rows, and again for fewer while the text of their tokens is more than `TEXT_BYTES`.

    Args:
        ask: Asks the collector.
        query: For what.
        responses: Whose threads measure the text.
        text: Makes it; None: it is not wanted.
        form: Of the response; JSON Lines have the text of a token in each layer.
        layers: Which layers the response has; None: all.
    """
    reply = await ask(query)
    if text is None:
        return reply
    while max_bytes := await responses.in_thread(_fewer_bytes, reply, text, form, layers):
        reply = await ask(dataclasses.replace(query, max_bytes=max_bytes))
    return reply


def _fewer_bytes(
    reply: RoutesReply, text: TokenText, form: Format, layers: tuple[int, ...] | None
) -> int | None:
    """Return how many bytes of rows have less text than a reply; None where that has no more."""
    traces = reply.traces()
    text_bytes = sum(
        text.json_bytes(trace) * (len(layers or trace.layers) if form == "jsonl" else 1)
        for trace in traces
    )
    if text_bytes <= TEXT_BYTES or all(trace.num_rows <= 1 for trace in traces):
        return None
    rows_bytes = sum(trace.size_bytes for trace in traces)
    return max(1, rows_bytes * TEXT_BYTES // (2 * text_bytes))
