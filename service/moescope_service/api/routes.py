"""``/routes``: the traces of a request, the list of recent ones, forgetting, pause and resume."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from moescope import formats
from moescope.errors import LayerNotCapturedError
from moescope.trace import RouteTrace
from moescope_service.api.bodies import Format, make_body
from moescope_service.api.collector_client import QUERY_TIMEOUT_S, CollectorClient, Reply
from moescope_service.api.responses import MEDIA_TYPES, MoescopeRoute, encoded
from moescope_service.collector.queries import FINISHING_WAIT_S
from moescope_service.settings import Settings, parse_layers

RequestId = Annotated[str, Path(description="Any id of the request that its client saw.")]
LAYERS = "Layers to return, such as ``0,5-7``; all by default."
WEIGHTS = "Whether to return the weights."
WAIT_S = (
    "Seconds to wait for a running request. By default one that was answered already is waited "
    "for, up to 2 s, and a running one is not."
)
MAX_WAIT_S = 60.0

router = APIRouter(route_class=MoescopeRoute, tags=["moescope"])


def collector_of(request: Request) -> CollectorClient:
    """Return the app's link to the collector."""
    client: CollectorClient = request.app.state.moescope_collector
    return client


Collector = Annotated[CollectorClient, Depends(collector_of)]


def keeper_of(collector: Collector) -> CollectorClient:
    """Return the app's link to the collector, where it keeps routes.

    Raises:
        HTTPException: 409, the server only counts.
    """
    if Settings.from_env().mode == "counts":
        raise HTTPException(
            409, "this server keeps no routes, only counts (--routes-mode counts): see /experts"
        )
    return collector


Keeper = Annotated[CollectorClient, Depends(keeper_of)]


@router.get("/routes", summary="Recent requests, newest first")
async def recent(
    collector: Keeper,
    limit: Annotated[int, Query(ge=1, le=1000, description="Sequences a page.")] = 50,
    before: Annotated[
        int | None, Query(ge=0, lt=2**63, description="``next_before`` of the last page.")
    ] = None,
) -> dict[str, Any]:
    """List sequences with their ids, tokens, finish reason, completeness and coverage."""
    return (await collector.ask("recent", limit=limit, before=before)).values


@router.post("/routes/pause", summary="Hold the capture")
async def pause(collector: Collector) -> dict[str, Any]:
    """Ship no rows until ``/routes/resume``; rows of meanwhile are missing, and said to be."""
    return (await collector.ask("capture", on=False)).values


@router.post("/routes/resume", summary="Go on capturing")
async def resume(collector: Collector) -> dict[str, Any]:
    """Undo ``/routes/pause``."""
    return (await collector.ask("capture", on=True)).values


@router.post("/routes/reset", summary="Count experts from zero")
async def reset(collector: Collector) -> dict[str, Any]:
    """Set the counts of ``/experts`` to zero; Prometheus counters and traces stay."""
    reply = await collector.ask("reset")
    hello_of(reply)
    return {"since_s": reply.values["since_s"]}


@router.get(
    "/routes/{request_id:path}",
    summary="The routes of a request",
    response_class=Response,
    responses={
        200: {
            "description": "The traces of every choice of the request; newest request first where "
            "an id was used again. Where older ones do not fit into 64 MiB the answer's metadata "
            "say ``truncated``.",
            "content": {media_type: {} for media_type in MEDIA_TYPES.values()},
        },
        202: {"description": "The request is still running."},
        404: {"description": "No request with this id was recorded."},
        409: {
            "description": "The trace is incomplete, which ``npy`` cannot say; or the server keeps "
            "no routes (--routes-mode counts)."
        },
        410: {"description": "The trace made room for newer ones (--routes-memory)."},
        422: {"description": "A parameter is malformed; the message says what is allowed."},
        501: {"description": "``arrow`` and ``parquet``: the server has no pyarrow."},
        503: {"description": "The collector process does not answer."},
    },
)
async def routes(
    request: Request,
    request_id: RequestId,
    collector: Keeper,
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
) -> Response:
    """Return which experts every token of a request went to, with which weights, in every layer."""
    chosen = layers_of(layers)
    if form == "npy":
        _check_npy_query(request)
    reply = await ask_routes(collector, request_id, wait_s)
    if reply.values["status"] == "running":
        return JSONResponse({"request_id": request_id, "status": "running"}, 202)
    _raise_if_gone(reply, request_id)
    if form == "npz" and chosen is None and index is None and weights:
        return await encoded(request, form, lambda: bytes(reply.arrays[0]))

    def make() -> bytes:
        traces = formats.load_npz(reply.arrays[0])
        if index is not None:
            traces = _choice(traces, request_id, index)
        return make_body(
            form,
            request_id,
            select(traces, chosen, weights),
            hello_of(reply),
            truncated=reply.values["truncated"],
        )

    return await encoded(request, form, make)


@router.delete("/routes/{request_id:path}", summary="Forget a request")
async def forget(request_id: RequestId, collector: Keeper) -> dict[str, Any]:
    """Forget the traces of a request; one that is running will leave none."""
    reply = await collector.ask("delete", request_id=request_id)
    if not reply.values["deleted"]:
        raise HTTPException(404, f"no request with the id {request_id!r} was recorded")
    return {"request_id": request_id, **reply.values}


def layers_of(text: str | None) -> tuple[int, ...] | None:
    """Return the layers that a text such as ``0,5-7`` names; None for all.

    Raises:
        HTTPException: 422, the text is malformed.
    """
    try:
        return None if text is None else parse_layers(text)
    except ValueError as error:
        raise HTTPException(422, f"layers: {error}") from None


def hello_of(reply: Reply) -> dict[str, Any]:
    """Return what the workers capture, as the collector says in its answer: a `Hello`'s values.

    Raises:
        HTTPException: 503, not all of them have said so; the collector may have just started.
    """
    hello: dict[str, Any] | None = reply.values["hello"]
    if hello is None:
        raise HTTPException(503, "no worker has said what it captures yet")
    return hello


async def ask_routes(collector: CollectorClient, request_id: str, wait_s: float | None) -> Reply:
    """Ask for the traces of a request, and wait for its end as the client wants it.

    Raises:
        CollectorGoneError: No answer came in time.
    """
    longest_s = QUERY_TIMEOUT_S + (FINISHING_WAIT_S if wait_s is None else wait_s)
    return await collector.ask("routes", timeout_s=longest_s, request_id=request_id, wait_s=wait_s)


def _raise_if_gone(reply: Reply, request_id: str) -> None:
    if reply.values["status"] == "unknown":
        raise HTTPException(
            404,
            f"no request with the id {request_id!r} was recorded: use an id of a response, or its "
            "X-Request-Id; requests that opted out leave no routes",
        )
    if reply.values["status"] == "evicted":
        raise HTTPException(
            410, f"the routes of {request_id!r} made room for newer ones; see --routes-memory"
        )


def select(
    traces: list[RouteTrace], layers: tuple[int, ...] | None, weights: bool
) -> list[RouteTrace]:
    """Keep some layers only, or leave the weights out.

    Raises:
        HTTPException: 422, a layer is not captured.
    """
    try:
        return [trace.select(layers=layers, weights=weights) for trace in traces]
    except LayerNotCapturedError as error:
        raise HTTPException(422, f"layers: {error}") from None


def _choice(traces: list[RouteTrace], request_id: str, index: int) -> list[RouteTrace]:
    chosen = [trace for trace in traces if trace.index == index]
    if not chosen:
        indices = sorted({trace.index for trace in traces})
        raise HTTPException(422, f"index: {request_id!r} has {indices}, got {index}")
    return chosen


def _check_npy_query(request: Request) -> None:
    """Refuse what would be silently untrue of vLLM's array: a layer left out would look dense."""
    if "layers" in request.query_params:
        raise HTTPException(422, "layers: npy holds every layer of the model; leave layers out")
    if "weights" in request.query_params:
        raise HTTPException(422, "weights: npy holds expert ids alone; leave weights out")
