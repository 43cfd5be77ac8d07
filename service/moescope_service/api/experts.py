"""``/experts`` and ``/moescope/info``: counts by layer and expert, and what is captured."""

from __future__ import annotations

import io
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, HTTPException, Query, Request, Response

from moescope import analysis
from moescope_service.api.dependencies import CollectorDep, SettingsDep, told
from moescope_service.api.endpoint import MoescopeRoute
from moescope_service.api.responses import encoded
from moescope_service.api.steps import steps_body
from moescope_service.api.tokens import token_text_of
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.histogram import PHASES
from moescope_service.messages import CaptureSpec
from moescope_service.queries import (
    MAX_WINDOW_S,
    ExpertsQuery,
    ExpertsReply,
    InfoQuery,
    StepsQuery,
)
from moescope_service.settings import Settings

router = APIRouter(route_class=MoescopeRoute, tags=["moescope"])


@router.get(
    "/experts",
    summary="Selections by layer and expert",
    response_class=Response,
    responses={200: {"content": {"application/json": {}, "application/x-npz": {}}}},
)
async def experts(
    request: Request,
    collector: CollectorDep,
    settings: SettingsDep,
    phase: Annotated[
        Literal["all", "prefill", "decode"],
        Query(description="Tokens of prompts (prefill), generated ones (decode), or both."),
    ] = "all",
    form: Annotated[
        Literal["json", "npz"], Query(alias="format", description="Format of the body.")
    ] = "json",
    window_s: Annotated[
        float | None,
        Query(
            gt=0,
            le=MAX_WINDOW_S,
            description="Only the last seconds, as many as are kept of the model; the answer's "
            "``window_s`` says how many they are.",
        ),
    ] = None,
    per: Annotated[
        Literal["step"] | None,
        Query(description="``step``: what steps read, in place of counts; see the documentation."),
    ] = None,
) -> Response:
    """Return how often each expert was selected, of all traffic, since start or the last reset.

    Every routing computed counts, kept or not: without preemption or speculation, rows with source
    ``computed`` x top-k. With ``per=step``: how many experts were distinct in a step.
    """
    if per is not None:
        return await _steps(request, collector, settings)
    reply = await collector.ask(ExpertsQuery(window_s=window_s))
    spec = told(reply.spec)
    if window_s is not None and window_s > reply.kept_s:
        raise HTTPException(
            422,
            f"invalid window_s {window_s:g}: expected at most {reply.kept_s:g}, for which counts "
            "of this model are kept",
        )
    return await encoded(request, form, lambda: _experts_body(reply, spec, phase, form))


async def _steps(request: Request, collector: CollectorClient, settings: Settings) -> Response:
    """Return what steps read since the last reset, by engine, kind and size."""
    if others := request.query_params.keys() - {"per"}:
        raise HTTPException(422, f"per: goes with no other parameter, got {sorted(others)}")
    if settings.mode == "counts":
        raise HTTPException(
            409, "per: this server only counts (--routes-mode counts), and knows no steps"
        )
    reply = await collector.ask(StepsQuery())
    spec = told(reply.spec)
    return await encoded(request, "json", lambda: steps_body(reply, spec))


def _experts_body(reply: ExpertsReply, spec: CaptureSpec, phase: str, form: str) -> bytes:
    shape = (len(PHASES), len(spec.layers), spec.num_experts)
    counts = np.frombuffer(reply.arrays[0], np.int64).reshape(shape)
    chosen = list(range(len(PHASES))) if phase == "all" else [PHASES.index(phase)]
    counts = counts[chosen].sum(axis=0)
    values = {
        "model": spec.model,
        "phase": phase,
        "since_s": reply.since_s,
        "window_s": reply.window_s,
        "num_rows": sum(reply.rows[number] for number in chosen),
        "num_experts": spec.num_experts,
    }
    if form == "npz":
        buffer = io.BytesIO()
        meta = np.frombuffer(orjson.dumps(values), np.uint8)
        np.savez(buffer, counts=counts, layers=np.array(spec.layers, np.int32), meta=meta)
        return buffer.getvalue()
    values |= {
        "layers": spec.layers,
        "counts": counts,
        "entropy_bits": analysis.entropy_bits(counts),
        "max_entropy_bits": analysis.max_entropy_bits(spec.num_experts),
        "entropy": analysis.entropy(counts),
        "normalized_entropy": analysis.normalized_entropy(counts),
        "max_violation": analysis.max_violation(counts),
        "active_experts": analysis.active_experts(counts),
        "top_experts": [analysis.top_experts(layer) for layer in counts],
    }
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)


@router.get("/moescope/info", summary="What is captured")
async def info(request: Request, collector: CollectorDep, settings: SettingsDep) -> dict[str, Any]:
    """Return the model, its layers, experts and routers, versions, limits and state."""
    known = (await collector.ask(InfoQuery())).info
    spec = told(known.spec)
    shown = ("model", "layers", "num_hidden_layers", "num_experts", "top_k", "router_types",
             "id_dtype", "weights_dtype", "device", "seed", "versions")  # fmt: skip
    return {
        **{name: getattr(spec, name) for name in shown},
        "mode": settings.mode,
        "capture": known.capture,
        "routes_default": "on" if settings.keeps_by_default else "off",
        "routes_sample": settings.sampled_share,
        "token_ids": settings.keeps_token_ids,
        "tokenizer": token_text_of(request) is not None,
        "weights_version": None if settings.mode == "counts" else known.weights_version,
        "store": known.store,
        "log": known.log,
        "started_s": known.started_s,
    }
