"""What endpoints share: settings, the way to the collector, what its replies mean in HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

from fastapi import Depends, HTTPException, Request

from moescope.errors import LayerNotCapturedError
from moescope.layers import parse_layers
from moescope.trace import RouteTrace
from moescope_service.api.sharing import SharedResponses, busy, while_connected
from moescope_service.frontend.collector_client import QUERY_TIMEOUT_S, CollectorClient
from moescope_service.parsers import shown
from moescope_service.queries import FINISHING_WAIT_S, WaitQuery
from moescope_service.settings import Settings
from moescope_service.token_text import TokenText

LAYERS = "Layers to return, such as ``0,5-7``; all by default."
WEIGHTS = "Whether to return the weights."
WAIT_S = (
    "Seconds to wait for a running request. By default one that was answered already is waited "
    "for, up to 2 s, and a running one is not."
)
START = (
    "The first row of each trace to return: where the last page ended, its ``next_start``, or how "
    "many rows are known already."
)
LIMIT = "Rows of each trace at most; a response holds as many as fit into it."
WEIGHTS_VERSION = (
    "Number of the weights that may have computed the rows; others are missing, and the trace is "
    "incomplete."
)
MAX_STALENESS = (
    "By how many changes of the weights rows may lag behind the present ones; others are missing, "
    "and the trace is incomplete. Mixed rows are."
)
MAX_WAIT_S = 60.0
MAX_ROWS = 2**31 - 1

T = TypeVar("T")


def settings_of(request: Request) -> Settings:
    """Return what the app was started with."""
    settings: Settings = request.app.state.moescope_settings
    return settings


SettingsDep = Annotated[Settings, Depends(settings_of)]


def collector_of(request: Request) -> CollectorClient:
    """Return the app's link to the collector."""
    client: CollectorClient = request.app.state.moescope_collector
    return client


CollectorDep = Annotated[CollectorClient, Depends(collector_of)]


def store_of(collector: CollectorDep, settings: SettingsDep) -> CollectorClient:
    """Return the app's link to the collector, where it keeps routes.

    Raises:
        HTTPException: 409, the server only counts.
    """
    if settings.mode == "counts":
        raise HTTPException(
            409, "this server keeps no routes, only counts (--routes-mode counts): see /experts"
        )
    return collector


StoreDep = Annotated[CollectorClient, Depends(store_of)]


def archive_of(request: Request) -> CollectorClient | None:
    """Return the app's link to the archive's process; None where there is none."""
    client: CollectorClient | None = request.app.state.moescope_archive
    return client


ArchiveDep = Annotated[CollectorClient | None, Depends(archive_of)]


def responses_of(request: Request) -> SharedResponses:
    """Return what makes the app's large responses."""
    responses: SharedResponses = request.app.state.moescope_responses
    return responses


ResponsesDep = Annotated[SharedResponses, Depends(responses_of)]


def layers_of(text: str | None) -> tuple[int, ...] | None:
    """Return the layers that a text such as ``0,5-7`` names; None for all.

    Raises:
        HTTPException: 422, the text is malformed.
    """
    try:
        return None if text is None else parse_layers(text)
    except ValueError as error:
        raise HTTPException(422, f"invalid layers {shown(text or '')}: {error}") from None


def told(value: T | None) -> T:
    """Return what the workers told the collector, such as what they capture.

    Raises:
        HTTPException: 503, they have not told it yet; the collector may have just started.
    """
    if value is None:
        raise HTTPException(503, "no worker has said what it captures yet")
    return value


def select(
    traces: Sequence[RouteTrace],
    layers: tuple[int, ...] | None,
    weights: bool,
    text: TokenText | None = None,
) -> list[RouteTrace]:
    """Keep some layers only, or leave the weights out; add the text of tokens, if any is wanted.

    Raises:
        HTTPException: 422, a layer is not captured.
    """
    try:
        selected = [trace.select(layers=layers, weights=weights) for trace in traces]
    except LayerNotCapturedError as error:
        raise HTTPException(422, f"invalid layers: {error}") from None
    return selected if text is None else [text.added_to(trace) for trace in selected]


async def wait_for_ends(request: Request, collector: CollectorClient, wait: WaitQuery) -> None:
    """Wait until requests have ended, as long as their client wants it and stays.

    Raises:
        HTTPException: 503, too many are waited for.
        CollectorGoneError: No reply came in time.
        ClientDisconnect: The client has left.
    """
    if wait.wait_s == 0:
        return
    longest_s = QUERY_TIMEOUT_S + (FINISHING_WAIT_S if wait.wait_s is None else wait.wait_s)
    reply = await while_connected(request, collector.ask(wait, timeout_s=longest_s))
    if reply.is_refused:
        raise busy("too many requests are waited for")
