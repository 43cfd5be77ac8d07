"""``/experts`` and ``/moescope/info``: counts by layer and expert, and what is captured."""

from __future__ import annotations

import io
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, HTTPException, Query, Request, Response

from moescope import analysis
from moescope_service.api.collector_client import Reply
from moescope_service.api.responses import MoescopeRoute, encoded
from moescope_service.api.routes import Collector, hello_of
from moescope_service.collector.windows import MAX_WINDOW_S
from moescope_service.histogram import PHASES
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
    collector: Collector,
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
) -> Response:
    """Return how often each expert was selected, of all traffic, since start or the last reset.

    Every routing computed counts, kept or not: without preemption or speculation, rows with source
    ``computed`` x top-k.
    """
    reply = await collector.ask("experts", window_s=window_s)
    hello = hello_of(reply)
    if window_s is not None and window_s > (kept_s := reply.values["kept_s"]):
        raise HTTPException(
            422,
            f"window_s: counts of this model are kept for {kept_s:g} s, got {window_s:g}: "
            "ask for no more than that",
        )
    return await encoded(request, form, lambda: _experts_body(reply, hello, phase, form))


def _experts_body(reply: Reply, hello: dict[str, Any], phase: str, form: str) -> bytes:
    shape = (len(PHASES), len(hello["layers"]), hello["num_experts"])
    counts = np.frombuffer(reply.arrays[0], np.int64).reshape(shape)
    chosen = list(range(len(PHASES))) if phase == "all" else [PHASES.index(phase)]
    counts = counts[chosen].sum(axis=0)
    values = {
        "model": hello["model"],
        "phase": phase,
        "since_s": reply.values["since_s"],
        "window_s": reply.values["window_s"],
        "num_rows": sum(reply.values["rows"][number] for number in chosen),
        "num_experts": hello["num_experts"],
    }
    if form == "npz":
        buffer = io.BytesIO()
        meta = np.frombuffer(orjson.dumps(values), np.uint8)
        np.savez(buffer, counts=counts, layers=np.array(hello["layers"], np.int32), meta=meta)
        return buffer.getvalue()
    values |= {
        "layers": hello["layers"],
        "counts": counts,
        "entropy": analysis.entropy(counts),
        "normalized_entropy": analysis.normalized_entropy(counts),
        "max_violation": analysis.max_violation(counts),
        "active_experts": analysis.active_experts(counts),
        "top_experts": [analysis.top_experts(layer) for layer in counts],
    }
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)


@router.get("/moescope/info", summary="What is captured")
async def info(collector: Collector) -> dict[str, Any]:
    """Return the model, its layers, experts and routers, versions, limits and state."""
    reply = await collector.ask("info")
    hello, values, settings = hello_of(reply), reply.values, Settings.from_env()
    shown = ("model", "layers", "num_hidden_layers", "num_experts", "top_k", "router_types",
             "id_dtype", "weights_dtype", "device", "seed", "versions")  # fmt: skip
    return {
        **{name: hello[name] for name in shown},
        "mode": settings.mode,
        "capture": values["capture"],
        "routes_default": settings.default,
        "routes_sample": settings.sample,
        "token_ids": settings.token_ids == "on",
        "store": values["store"],
        "started_s": values["started_s"],
    }
