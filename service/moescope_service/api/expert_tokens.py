"""``/experts/{layer}/{expert}/tokens``: which tokens of the newest requests went to an expert."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, HTTPException, Path, Query, Request, Response

from moescope.errors import LayerNotCapturedError
from moescope_service.api.auth import ReaderDep
from moescope_service.api.dependencies import ResponsesDep, SettingsDep, StoreDep, told
from moescope_service.api.endpoint import MoescopeRoute
from moescope_service.api.responses import compressed, wants_gzip
from moescope_service.api.sharing import MadeBody
from moescope_service.api.tokens import token_text_of
from moescope_service.expert_tokens import ExpertTokens
from moescope_service.messages import CaptureSpec
from moescope_service.queries import LayerQuery, LayerReply

MAX_NUMBER = 2**31 - 1
MAX_REQUESTS = 200
MAX_ROWS = 2**20
"""After so many rows no more traces are read."""
MAKING_BYTES = 64 * 2**20
"""Of columns of `MAX_ROWS` rows, and of what sorting them takes."""

router = APIRouter(route_class=MoescopeRoute, tags=["moescope"])


@router.get(
    "/experts/{layer}/{expert}/tokens",
    summary="The tokens that went to an expert",
    response_class=Response,
    responses={
        200: {"content": {"application/json": {}}},
        409: {
            "description": "The server keeps no routes (--routes-mode counts), or no token ids "
            "(--routes-token-ids off)."
        },
        422: {"description": "There is no such layer or expert; the message says which there are."},
        503: {"description": "The collector process does not answer, or too much is asked of it."},
    },
)
async def expert_tokens(
    request: Request,
    collector: StoreDep,
    settings: SettingsDep,
    responses: ResponsesDep,
    owner: ReaderDep,
    layer: Annotated[
        int, Path(ge=0, le=MAX_NUMBER, description="The model's own number of the layer.")
    ],
    expert: Annotated[int, Path(ge=0, le=MAX_NUMBER, description="The expert's number in it.")],
    requests: Annotated[
        int, Query(ge=1, le=MAX_REQUESTS, description="Of how many of the newest kept requests.")
    ] = MAX_REQUESTS,
    limit: Annotated[int, Query(ge=1, le=1000, description="Tokens at most.")] = 50,
) -> Response:
    """Return the tokens that went to an expert in a layer, the most frequent ones first."""
    if not settings.keeps_token_ids:
        raise HTTPException(409, "this server keeps no token ids (--routes-token-ids off)")
    text, gzip = token_text_of(request), wants_gzip(request)

    def make(counted: ExpertTokens) -> MadeBody:
        top = counted.top(limit)
        ids = np.array([one.token_id for one in top], np.int32)
        texts = [None] * len(top) if text is None else text.of(ids)
        values: dict[str, Any] = {
            "layer": layer,
            "expert": expert,
            "requests": counted.num_requests,
            "rows": counted.num_rows,
            "rows_missing": counted.num_missing,
            "rows_selected": counted.num_selected,
            "tokens": [
                {"token": shown, **dataclasses.asdict(one)}
                for shown, one in zip(texts, top, strict=True)
            ],
        }
        return compressed(orjson.dumps(values), "json", gzip=gzip)

    async def read() -> ExpertTokens:
        counted = ExpertTokens(expert, requests, MAX_ROWS)
        query = LayerQuery(layer=layer, owner=owner)
        while True:
            reply = await collector.ask(query)
            _check(told(reply.spec), layer, expert)
            await responses.in_thread(_add, counted, reply)
            if counted.is_full or reply.next_before is None:
                return counted
            query = dataclasses.replace(query, before=reply.next_before, start=reply.next_start)

    return await responses.respond(
        request,
        ("expert_tokens", owner, layer, expert, requests, limit, gzip),
        max_bytes=MAKING_BYTES,
        ask=read,
        make=make,
    )


def _add(counted: ExpertTokens, reply: LayerReply) -> None:
    counted.add(reply.traces())


def _check(spec: CaptureSpec, layer: int, expert: int) -> None:
    """Refuse what the model does not have.

    Raises:
        HTTPException: 422, there is no such layer or expert.
    """
    if layer not in spec.layers:
        error = LayerNotCapturedError([layer], spec.layers)
        raise HTTPException(422, f"invalid layer: {error}")
    if expert >= spec.num_experts:
        raise HTTPException(422, f"invalid expert {expert}: expected 0 to {spec.num_experts - 1}")
