"""``/routes/weights``: the label of the engine's weights, which is vLLM's own.

vLLM keeps a label, and says under which one each output token was sampled; its endpoints that set
and show it are there in development mode alone. Relies on vLLM 0.32.0, ``engine/protocol.py``
(``EngineClient.update_weight_version``).
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from moescope_service.api.auth import ADMIN
from moescope_service.api.endpoint import MoescopeRoute

MAX_LABEL_CHARS = 256
router = APIRouter(route_class=MoescopeRoute, tags=["moescope"])


class Label(BaseModel):
    """What the weights are to be called."""

    model_config = ConfigDict(extra="forbid")

    version: Annotated[
        str,
        Field(min_length=1, max_length=MAX_LABEL_CHARS, description="The label, as ``step-7``."),
    ]


async def _engine(request: Request) -> Any:
    """Return vLLM's ``EngineClient``.

    Raises:
        HTTPException: 501, it knows no labels.
    """
    engine = request.app.state.moescope_engine
    if not hasattr(engine, "update_weight_version"):
        raise HTTPException(501, "this vLLM has no labels of weights: they came with 0.32")
    return engine


EngineDep = Annotated[Any, Depends(_engine)]
_NO_LABELS: dict[int | str, dict[str, Any]] = {501: {"description": "This vLLM has no labels."}}


@router.get("/routes/weights", summary="The label of the weights", responses=_NO_LABELS)
async def label(engine: EngineDep) -> dict[str, Any]:
    """Return vLLM's label of the engine's weights: ``default`` until one is set."""
    return {"version": await engine.get_weight_version()}


@router.post(
    "/routes/weights", summary="Label the weights", dependencies=[ADMIN], responses=_NO_LABELS
)
async def set_label(engine: EngineDep, wanted: Label) -> dict[str, Any]:
    """Label the engine's weights; tokens that are sampled from here on have the label.

    Set it while generation is paused, after new weights are there: a step that runs meanwhile may
    have either label.
    """
    await engine.update_weight_version(wanted.version)
    return {"version": wanted.version}
