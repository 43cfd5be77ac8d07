"""What an id in a path finds, in HTTP: which of its readings is meant, and why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import HTTPException, Path

from moescope_service.queries import Found, RoutesReply

RequestId = Annotated[str, Path(description="Any id of the request that its client saw.")]


def first_known(meant: Sequence[str], reply: RoutesReply) -> tuple[str, Found]:
    """Return the first id that finds something, and what; else the first one.

    Args:
        meant: What `moescope_service.ids.meant_ids` says, in the order asked.
        reply: The collector's.
    """
    both = list(zip(meant, reply.found, strict=True))
    return next((one for one in both if one[1].status != "unknown"), both[0])


def not_recorded(request_id: str) -> HTTPException:
    """Return the error that says that an id finds nothing."""
    return HTTPException(
        404,
        f"no request with the id {request_id!r} was recorded: use the id of the server's response "
        "(LangChain shows lc_run--… in its place, LiteLLM resp_ and base64), or an X-Request-Id of "
        "your own, which always finds its request; requests that opted out leave no routes",
    )


def raise_unless_found(found: Found, request_id: str, index: int | None) -> None:
    """Raise what it means where an id finds no trace.

    Args:
        found: What it finds; nothing is raised of a running request.
        request_id: The id.
        index: The choice that was asked for; None: all.

    Raises:
        HTTPException: 404, 410, or 422 where the request has no such choice.
    """
    if found.status == "unknown":
        raise not_recorded(request_id)
    if found.status == "evicted":
        raise HTTPException(
            410, f"the routes of {request_id!r} made room for newer ones; see --routes-memory"
        )
    if found.status == "lost":
        raise HTTPException(
            410,
            f"the routes of {request_id!r} are lost: the collector process hung for so long that "
            "the server had to give up the request's registration; see "
            "moescope_registrations_lost_total",
        )
    if found.indices:
        raise HTTPException(
            422, f"invalid index {index}: expected one that {request_id!r} has, {found.indices}"
        )
