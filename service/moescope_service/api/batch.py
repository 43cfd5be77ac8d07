"""``POST /routes/batch``: the traces of many requests in one answer."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from moescope import batch, formats
from moescope_service.api.collector_client import CollectorClient, Reply
from moescope_service.api.responses import MEDIA_TYPES, MoescopeRoute, encoded
from moescope_service.api.routes import (
    LAYERS,
    MAX_WAIT_S,
    WAIT_S,
    WEIGHTS,
    Keeper,
    ask_routes,
    layers_of,
    select,
)

MAX_REQUESTS = 1024
_AT_ONCE = 32
"""Questions that are open at a time: what others ask meanwhile waits for these at most.

An answer takes the collector 0.2 to 1.2 ms a sequence, for 6 kB to 2.3 MB on one core, and a scrape
of the metrics waits 250 ms.
"""

router = APIRouter(route_class=MoescopeRoute, tags=["moescope"])


class BatchRequest(BaseModel):
    """Which requests, and which part of their traces."""

    model_config = ConfigDict(extra="forbid")

    request_ids: Annotated[
        list[Annotated[str, StringConstraints(min_length=1)]],
        Field(
            min_length=1,
            max_length=MAX_REQUESTS,
            description="Any ids of the requests that their clients saw; one that is named twice "
            "is answered once.",
        ),
    ]
    format: Annotated[
        Literal["json", "npz"],
        Field(description="``npz``: as for one request, with one more member ``requests``."),
    ] = "json"
    layers: Annotated[str | None, Field(description=LAYERS)] = None
    weights: Annotated[bool, Field(description=WEIGHTS)] = True
    wait_s: Annotated[
        float | None,
        Field(ge=0, le=MAX_WAIT_S, description=f"{WAIT_S} Counts for all of them together."),
    ] = None


@router.post(
    "/routes/batch",
    summary="The routes of many requests",
    response_class=Response,
    responses={
        200: {
            "description": "The status of every request, ``finished``, ``running``, ``evicted`` "
            "or ``unknown``, and the traces of those that finished.",
            "content": {MEDIA_TYPES[form]: {} for form in ("json", "npz")},
        },
        422: {"description": "The body is malformed; the message says what is allowed."},
        503: {"description": "The collector process does not answer."},
    },
)
async def routes_batch(request: Request, wanted: BatchRequest, collector: Keeper) -> Response:
    """Return the traces of up to 1,024 requests, each with its status, in the order asked."""
    layers = layers_of(wanted.layers)
    replies = await _ask_all(collector, list(dict.fromkeys(wanted.request_ids)), wanted.wait_s)

    def make() -> bytes:
        made = batch.RoutesBatch(
            status={request_id: reply.values["status"] for request_id, reply in replies.items()},
            traces={
                request_id: select(formats.load_npz(reply.arrays[0]), layers, wanted.weights)
                for request_id, reply in replies.items()
                if reply.values["status"] == "finished"
            },
            truncated=frozenset(
                request_id for request_id, reply in replies.items() if reply.values.get("truncated")
            ),
        )
        return batch.dump_json(made) if wanted.format == "json" else batch.dump_npz(made)

    return await encoded(request, wanted.format, make)


async def _ask_all(
    collector: CollectorClient, request_ids: list[str], wait_s: float | None
) -> dict[str, Reply]:
    turns = asyncio.Semaphore(_AT_ONCE)
    end_s = time.monotonic() + (wait_s or 0.0)

    async def ask(request_id: str) -> Reply:
        async with turns:
            left_s = None if wait_s is None else max(0.0, end_s - time.monotonic())
            return await ask_routes(collector, request_id, left_s)

    replies = await asyncio.gather(*map(ask, request_ids))
    return dict(zip(request_ids, replies, strict=True))
