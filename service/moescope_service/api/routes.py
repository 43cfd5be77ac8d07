"""``/routes``: the traces of a request, the list of recent ones, forgetting, pause and resume."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, HTTPException, Query, Request, Response

from moescope.version_runs import MAX_VERSION
from moescope_service.api.archived import delete_archived, with_archived
from moescope_service.api.auth import ADMIN, DeleterDep, ReaderDep
from moescope_service.api.bodies import PAGE_BYTES, Format, NpyOptions, Page, making_bytes
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
    ArchiveDep,
    CollectorDep,
    ResponsesDep,
    SettingsDep,
    StoreDep,
    layers_of,
    select,
    told,
    wait_for_ends,
)
from moescope_service.api.ended import follow_ended
from moescope_service.api.endpoint import MoescopeRoute
from moescope_service.api.found import RequestId, first_known, not_recorded, raise_unless_found
from moescope_service.api.responses import MEDIA_TYPES, NEXT_START, compressed, wants_gzip
from moescope_service.api.sharing import MadeBody
from moescope_service.api.streaming import EVENTS_TYPE, Streamed
from moescope_service.api.tokens import TOKENS, ask_for_rows, text_of
from moescope_service.ids import meant_ids, short_id
from moescope_service.queries import (
    CaptureQuery,
    DeleteQuery,
    RecentQuery,
    ResetQuery,
    RoutesQuery,
    RoutesReply,
    WaitQuery,
    Wanted,
)

router = APIRouter(route_class=MoescopeRoute, tags=["moescope"])


@router.get(
    "/routes",
    summary="Recent requests, newest first",
    response_model=None,
    responses={
        200: {
            "description": "A page; with ``follow`` server-sent events, whose ``sequences`` ended "
            "after the event before.",
            "content": {EVENTS_TYPE: {}},
        }
    },
)
@router.get("/routes/", include_in_schema=False, response_model=None)
async def recent(
    request: Request,
    collector: StoreDep,
    owner: ReaderDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="Sequences a page.")] = 50,
    before: Annotated[
        int | None, Query(ge=0, lt=2**63, description="``next_before`` of the last page.")
    ] = None,
    follow: Annotated[
        bool, Query(description="Whether to send those that end from now on, as they end.")
    ] = False,
) -> dict[str, Any] | Streamed:
    """List sequences with their ids, tokens, finish reason, completeness and coverage."""
    if follow:
        if others := request.query_params.keys() - {"follow"}:
            raise HTTPException(422, f"follow: goes with no other parameter, got {sorted(others)}")
        return await follow_ended(request, collector, owner)
    page = await collector.ask(RecentQuery(limit=limit, before=before, owner=owner))
    return {"sequences": page.sequences, "next_before": page.next_before}


@router.post("/routes/pause", summary="Hold the capture", dependencies=[ADMIN])
async def pause(collector: CollectorDep) -> dict[str, Any]:
    """Ship no rows until ``/routes/resume``; rows of meanwhile are missing, and said to be."""
    return {"capture": (await collector.ask(CaptureQuery(on=False))).capture}


@router.post("/routes/resume", summary="Go on capturing", dependencies=[ADMIN])
async def resume(collector: CollectorDep) -> dict[str, Any]:
    """Undo ``/routes/pause``."""
    return {"capture": (await collector.ask(CaptureQuery(on=True))).capture}


@router.post("/routes/reset", summary="Count experts from zero", dependencies=[ADMIN])
async def reset(collector: CollectorDep) -> dict[str, Any]:
    """Set the counts of ``/experts`` to zero; Prometheus counters and traces stay."""
    reply = await collector.ask(ResetQuery())
    told(reply.spec)
    return {"since_s": reply.since_s}


@router.get(
    "/routes/{request_id:path}",
    summary="The routes of a request",
    response_class=Response,
    responses={
        200: {
            "description": "The traces of every choice of the request; newest request first where "
            "an id was used again. Where a response does not hold all of it, it says "
            "``truncated`` and, where rows are left out, ``next_start`` (also in the header "
            f"``{NEXT_START}``): the ``start`` of the next page.",
            "content": {media_type: {} for media_type in MEDIA_TYPES.values()},
        },
        202: {"description": "The request is still running."},
        404: {"description": "No request with this id was recorded."},
        409: {
            "description": "The trace is incomplete, which ``npy`` cannot say; or the server keeps "
            "no routes (--routes-mode counts)."
        },
        410: {
            "description": "The trace made room for newer ones (--routes-memory), or its "
            "registration was lost while the collector hung."
        },
        413: {"description": "``npy`` without ``limit`` of an array that fits no response."},
        422: {"description": "A parameter is malformed; the message says what is allowed."},
        501: {
            "description": "``arrow`` and ``parquet``: the server has no pyarrow. ``tokens``: it "
            "has no tokenizer (--skip-tokenizer-init)."
        },
        503: {"description": "The collector process does not answer, or too much is asked of it."},
    },
)
async def routes(
    request: Request,
    request_id: RequestId,
    collector: StoreDep,
    archive: ArchiveDep,
    responses: ResponsesDep,
    owner: ReaderDep,
    form: Annotated[
        Format,
        Query(
            alias="format",
            description="Format of the body. ``npy``: vLLM's ``routed_experts`` of one choice; "
            "``arrow``: an IPC stream; ``arrow`` and ``parquet``: one row a token.",
        ),
    ] = "json",
    layers: Annotated[str | None, Query(description=LAYERS)] = None,
    index: Annotated[int | None, Query(ge=0, description="One choice of the response.")] = None,
    weights: Annotated[bool, Query(description=WEIGHTS)] = True,
    wait_s: Annotated[float | None, Query(ge=0, le=MAX_WAIT_S, description=WAIT_S)] = None,
    start: Annotated[int, Query(ge=0, le=MAX_ROWS, description=START)] = 0,
    limit: Annotated[int | None, Query(ge=1, le=MAX_ROWS, description=LIMIT)] = None,
    dtype: Annotated[
        Literal["int16", "int32"] | None,
        Query(description="Of ``npy``; by default vLLM's uint8 or uint16, int16 with ``fill``."),
    ] = None,
    fill: Annotated[
        Literal["-1"] | None,
        Query(description="``npy``: the experts of missing rows, in place of a 409."),
    ] = None,
    weights_version: Annotated[
        int | None, Query(ge=0, le=MAX_VERSION, description=WEIGHTS_VERSION)
    ] = None,
    max_staleness: Annotated[
        int | None, Query(ge=0, le=MAX_VERSION, description=MAX_STALENESS)
    ] = None,
    tokens: Annotated[bool, Query(description=TOKENS)] = False,
) -> Response:
    """Return which experts every token of a request went to, with which weights, in every layer."""
    chosen = layers_of(layers)
    _check_npy_query(request, form)
    text = text_of(request, is_wanted=tokens)
    npy = NpyOptions(dtype, None if fill is None else -1)
    meant = meant_ids(request_id)
    wait = WaitQuery(request_ids=[*map(short_id, meant)], wait_s=wait_s, owner=owner)
    await wait_for_ends(request, collector, wait)
    query = RoutesQuery(
        wanted=[Wanted(request_id=short_id(one), start=start) for one in meant],
        limit=limit,
        index=index,
        weights_version=weights_version,
        max_staleness=max_staleness,
        max_bytes=PAGE_BYTES[form],
        owner=owner,
    )
    gzip = wants_gzip(request)

    async def ask(query: RoutesQuery) -> RoutesReply:
        return await with_archived(archive, query, await collector.ask(query))

    def make(reply: RoutesReply) -> MadeBody:
        found_id, found = first_known(meant, reply)
        if found.status == "running":
            running = orjson.dumps({"request_id": found_id, "status": "running"})
            return MadeBody(running, MEDIA_TYPES["json"], status_code=202)
        raise_unless_found(found, found_id, index)
        traces = reply.traces()
        if form == "npy" and limit is None and found.next_start is not None:
            raise HTTPException(
                413, "the array is larger than a response may be: ask for pages, by start and limit"
            )
        page = Page(
            request_id=found_id,
            traces=select([traces[number] for number in found.traces], chosen, weights, text),
            spec=told(reply.spec),
            truncated=found.lacks_older,
            next_start=found.next_start,
            npy=npy,
        )
        return compressed(page.write(form), form, gzip=gzip, next_start=found.next_start)

    return await responses.respond(
        request,
        (
            request_id,
            owner,
            start,
            limit,
            index,
            form,
            chosen,
            weights,
            npy,
            gzip,
            weights_version,
            max_staleness,
            tokens,
        ),
        max_bytes=making_bytes(form, tokens=tokens),
        ask=lambda: ask_for_rows(ask, query, responses, text, form, chosen),
        make=make,
    )


@router.delete("/routes/{request_id:path}", summary="Forget a request")
async def forget(
    request_id: RequestId,
    collector: StoreDep,
    archive: ArchiveDep,
    settings: SettingsDep,
    owner: DeleterDep,
) -> dict[str, Any]:
    """Forget the traces of a request; one that is running will leave none.

    Of several that an id finds, those whose response has it; others only where none has.
    """
    for meant in meant_ids(request_id):
        query = DeleteQuery(request_id=short_id(meant), owner=owner)
        reply = await collector.ask(query)
        if deleted := await delete_archived(archive, query, reply):
            return {"request_id": meant, "deleted": deleted}
        if reply.others and not settings.is_private:
            raise HTTPException(
                403,
                f"{meant!r} was not made with this request's API key: only the admin deletes it "
                "(--routes-admin-key)",
            )
    raise not_recorded(request_id)


def _check_npy_query(request: Request, form: Format) -> None:
    """Refuse what would be silently untrue of vLLM's array: a layer left out would look dense."""
    if form != "npy":
        for name in {"dtype", "fill"} & request.query_params.keys():
            raise HTTPException(422, f"{name}: only format=npy takes it")
        return
    if "layers" in request.query_params:
        raise HTTPException(422, "layers: npy holds every layer of the model; leave layers out")
    if "weights" in request.query_params:
        raise HTTPException(422, "weights: npy holds expert ids alone; leave weights out")
    if "tokens" in request.query_params:
        raise HTTPException(422, "tokens: npy holds expert ids alone; leave tokens out")
