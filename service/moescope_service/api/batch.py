"""``POST /routes/batch``: the traces of many requests in one answer."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from moescope import batch
from moescope.trace import RouteTrace
from moescope.version_runs import MAX_VERSION
from moescope_service.api.auth import ReaderDep
from moescope_service.api.bodies import PAGE_BYTES, making_bytes, require_arrow
from moescope_service.api.dependencies import (
    LAYERS,
    LIMIT,
    MAX_ROWS,
    MAX_STALENESS,
    MAX_WAIT_S,
    START,
    WAIT_S,
    WEIGHTS,
    WEIGHTS_VERSION,
    ResponsesDep,
    StoreDep,
    layers_of,
    select,
    wait_for_ends,
)
from moescope_service.api.endpoint import MoescopeRoute
from moescope_service.api.responses import MEDIA_TYPES, compressed, wants_gzip
from moescope_service.api.sharing import MadeBody
from moescope_service.api.tokens import TOKENS, ask_for_rows, text_of
from moescope_service.ids import short_id
from moescope_service.queries import RoutesQuery, RoutesReply, WaitQuery, Wanted

Row = Annotated[int, Field(ge=0, le=MAX_ROWS)]
Version = Annotated[int, Field(ge=0, le=MAX_VERSION)]

MAX_REQUESTS = 1024
_Format = Literal["json", "npz", "arrow", "parquet"]
_FORMS: tuple[_Format, ...] = get_args(_Format)
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
        _Format,
        Field(
            description="``npz``: as for one request, with one more member ``requests``; ``arrow`` "
            "and ``parquet``: as for one request, with ``requests`` in the schema's metadata."
        ),
    ] = "json"
    start: Annotated[
        Row | dict[str, Row],
        Field(description=f"{START} Of all requests, or by id; 0 of those that are not named."),
    ] = 0
    limit: Annotated[int | None, Field(ge=1, le=MAX_ROWS, description=LIMIT)] = None
    layers: Annotated[str | None, Field(description=LAYERS)] = None
    weights: Annotated[bool, Field(description=WEIGHTS)] = True
    wait_s: Annotated[
        float | None,
        Field(ge=0, le=MAX_WAIT_S, description=f"{WAIT_S} Counts for all of them together."),
    ] = None
    weights_version: Version | None = Field(None, description=WEIGHTS_VERSION)
    max_staleness: Version | None = Field(None, description=MAX_STALENESS)
    tokens: Annotated[bool, Field(description=TOKENS)] = False


@router.post(
    "/routes/batch",
    summary="The routes of many requests",
    response_class=Response,
    responses={
        200: {
            "description": "The status of every request, ``finished``, ``running``, ``evicted``, "
            "``lost`` or ``unknown``, and the traces of those that finished.",
            "content": {MEDIA_TYPES[form]: {} for form in _FORMS},
        },
        422: {"description": "The body is malformed; the message says what is allowed."},
        501: {
            "description": "``arrow`` and ``parquet``: the server has no pyarrow. ``tokens``: it "
            "has no tokenizer."
        },
        503: {"description": "The collector process does not answer."},
    },
)
async def routes_batch(
    request: Request,
    wanted: BatchRequest,
    collector: StoreDep,
    responses: ResponsesDep,
    owner: ReaderDep,
) -> Response:
    """Return the traces of up to 1,024 requests, each with its status, in the order asked.

    What does not fit into one response has a ``next_start``, to be asked for with ``start``. An id
    that finds the same traces as one before it names that one: ``same_as``.
    """
    layers = layers_of(wanted.layers)
    text = text_of(request, is_wanted=wanted.tokens)
    ids = list(dict.fromkeys(wanted.request_ids))
    starts = wanted.start if isinstance(wanted.start, dict) else dict.fromkeys(ids, wanted.start)
    wait = WaitQuery(request_ids=[*map(short_id, ids)], wait_s=wanted.wait_s, owner=owner)
    await wait_for_ends(request, collector, wait)
    query = RoutesQuery(
        wanted=[Wanted(request_id=short_id(one), start=starts.get(one, 0)) for one in ids],
        limit=wanted.limit,
        weights_version=wanted.weights_version,
        max_staleness=wanted.max_staleness,
        max_bytes=PAGE_BYTES[wanted.format],
        owner=owner,
    )
    gzip = wants_gzip(request)

    def make(reply: RoutesReply) -> MadeBody:
        traces = select(reply.traces(), layers, wanted.weights, text)
        made = _batch(ids, reply, traces)
        return compressed(_written(made, wanted.format), wanted.format, gzip=gzip)

    return await responses.respond(
        request,
        (wanted.model_dump_json(), owner, gzip),
        max_bytes=making_bytes(wanted.format, tokens=wanted.tokens),
        ask=lambda: ask_for_rows(collector.ask, query, responses, text, wanted.format, layers),
        make=make,
    )


def _written(made: batch.RoutesBatch, form: _Format) -> bytes:
    """Return a batch in a format.

    Raises:
        HTTPException: It needs pyarrow.
    """
    match form:
        case "json":
            return batch.dump_json(made)
        case "npz":
            return batch.dump_npz(made)
        case "arrow" | "parquet":
            arrow = require_arrow()
            write = arrow.arrow_bytes if form == "arrow" else arrow.parquet_bytes
            content: bytes = write(batch.to_table(made))
            return content


def _batch(ids: list[str], reply: RoutesReply, traces: list[RouteTrace]) -> batch.RoutesBatch:
    found = dict(zip(ids, reply.found, strict=True))
    return batch.RoutesBatch(
        status={one: what.status for one, what in found.items()},
        traces={
            one: [traces[number] for number in what.traces]
            for one, what in found.items()
            if what.status == "finished"
        },
        truncated=frozenset(one for one, what in found.items() if what.lacks_older),
        next_start={
            one: what.next_start for one, what in found.items() if what.next_start is not None
        },
    )
