"""What the archive has of requests that the collector does not keep any more."""

from __future__ import annotations

import dataclasses

from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.queries import DeleteQuery, DeleteReply, RoutesQuery, RoutesReply

ARCHIVE_TIMEOUT_S = 15.0
"""How long a look-up in the archive may take, in seconds: it may be publishing a file."""
_NOT_KEPT = frozenset({"unknown", "evicted"})


async def with_archived(
    archive: CollectorClient | None, query: RoutesQuery, reply: RoutesReply
) -> RoutesReply:
    """Return the collector's reply, or the archive's where the collector keeps none of the ids.

    Rows are not chosen by their weights there: the numbers of weights are those of one server.

    Args:
        archive: Is asked; None: there is none.
        query: What the collector was asked.
        reply: What it said.

    Raises:
        CollectorGoneError: The archive's process does not answer.
    """
    is_by_weights = query.weights_version is not None or query.max_staleness is not None
    is_kept = any(one.status not in _NOT_KEPT for one in reply.found)
    if archive is None or is_kept or is_by_weights:
        return reply
    archived = await archive.ask(query, timeout_s=ARCHIVE_TIMEOUT_S)
    return archived if archived.heads or any(f.indices for f in archived.found) else reply


async def delete_archived(
    archive: CollectorClient | None, query: DeleteQuery, reply: DeleteReply
) -> int:
    """Delete in the archive, too, and return how many traces are deleted in all.

    Args:
        archive: Is asked; None: there is none.
        query: What the collector was asked.
        reply: What it said.

    Raises:
        CollectorGoneError: The archive's process does not answer; what the collector kept is
            deleted all the same.
    """
    if archive is None:
        return reply.deleted
    query = dataclasses.replace(query, own_only=reply.is_own)
    archived = await archive.ask(query, timeout_s=ARCHIVE_TIMEOUT_S)
    # Most of what the collector kept is in both.
    return max(reply.deleted, archived.deleted)
