"""Answers ``/routes/{id}`` from the archive, page by page as the collector does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from moescope import formats
from moescope.archive.table import entries_of
from moescope.trace import RouteTrace
from moescope_service.archive.files import Files, Places
from moescope_service.archive.index import FileIndex, id_key
from moescope_service.archive.pending import Pending, matching
from moescope_service.messages import CaptureSpec
from moescope_service.queries import ArrayHead, Found, RoutesQuery, RoutesReply, Wanted

TRACE_BYTES = 1024
"""What a trace adds to a reply beside its rows."""
MAX_FOUND = 1024
"""Choices of a request that one reply has at most."""
NOBODY = ""
"""An owner that made nothing; see `RoutesQuery.owner`."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Candidate:
    created_s: float
    index: int
    num_tokens: int
    page: Callable[[int, int], tuple[RouteTrace, CaptureSpec]]
    """Reads up to so many rows from a position on."""


def routes(files: Files, pending: Iterable[Pending], query: RoutesQuery) -> RoutesReply:
    """Answer a query: of the first id that finds anything, the newest request.

    Raises:
        OSError: A file cannot be read.
        FormatError: A file is broken.
    """
    found: list[Found] = []
    for wanted in query.wanted:
        candidates = _candidates(files, pending, wanted.request_id, query.owner)
        if candidates:
            nothing = [Found(status="unknown")] * (len(query.wanted) - len(found) - 1)
            one, reply = _answer(candidates, wanted, query)
            return dataclasses.replace(reply, found=[*found, one, *nothing])
        found.append(Found(status="unknown"))
    return RoutesReply(found=found)


def _candidates(
    files: Files, pending: Iterable[Pending], request_id: str, owner: str | None
) -> list[_Candidate]:
    if owner == NOBODY:
        return []
    own, found = matching(pending, request_id, owner)
    key = id_key(request_id, owner)
    in_files = files.find(key, own_only=True)
    if not (own or in_files):
        in_files, own = files.find(key), found
    return [*map(_of_pending, own), *_newest(files, in_files)]


def _newest(files: Files, found: list[Places]) -> list[_Candidate]:
    """Return the choices of the newest request, and one of an older request if there is one."""
    if not found:
        return []
    times = [file.created_s[places] for file, places in found]
    newest_s = max(float(one.max()) for one in times)
    oldest_s = min(float(one.min()) for one in times)
    chosen = [
        (file, place)
        for (file, places), created_s in zip(found, times, strict=True)
        for place in places[created_s == newest_s].tolist()
    ]
    if oldest_s < newest_s:
        chosen += [
            (file, place)
            for (file, places), created_s in zip(found, times, strict=True)
            for place in places[created_s == oldest_s][:1].tolist()
        ]
    return [_of_file(files, *one) for one in chosen]


def _of_pending(one: Pending) -> _Candidate:
    trace = one.entry.trace
    return _Candidate(
        trace.created_s,
        trace.index,
        trace.num_tokens,
        lambda start, limit: (trace.page(start, limit), one.spec),
    )


def _of_file(files: Files, file: FileIndex, place: int) -> _Candidate:
    first_row, num_tokens = int(file.first_row[place]), int(file.num_tokens[place])

    def page(start: int, limit: int) -> tuple[RouteTrace, CaptureSpec]:
        first = min(start, num_tokens - 1)
        end = first + limit
        end = num_tokens if end >= num_tokens - 1 else end  # the last token goes with the last row
        table, shared = files.rows(file, first_row + first, first_row + end)
        (entry,) = entries_of(table, shared)
        return entry.trace.page(start, limit), msgspec.convert(shared["spec"], CaptureSpec)

    return _Candidate(float(file.created_s[place]), int(file.index[place]), num_tokens, page)


def _answer(
    candidates: list[_Candidate], wanted: Wanted, query: RoutesQuery
) -> tuple[Found, RoutesReply]:
    newest_s = max(one.created_s for one in candidates)
    choices = sorted((one for one in candidates if one.created_s == newest_s), key=_index)
    lacks_older = len(choices) < len(candidates) or len(choices) > MAX_FOUND
    chosen = [one for one in choices if query.index in {None, one.index}][:MAX_FOUND]
    if not chosen:
        indices = sorted({one.index for one in choices})[:MAX_FOUND]
        return Found(status="finished", indices=indices), RoutesReply(found=[])
    limit, next_start = 0, None
    longest = max(one.num_tokens - 1 for one in chosen) - wanted.start
    if longest > 0:
        limit = min(longest, query.limit or longest, _room(chosen, wanted.start, query.max_bytes))
        next_start = wanted.start + limit if limit < longest else None
    read = [one.page(wanted.start, limit) for one in chosen]
    arrays = formats.arrays_of([trace for trace, _ in read])
    members = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    heads = [ArrayHead(name=n, dtype=a.dtype.str, shape=a.shape) for n, a in members.items()]
    one = Found(
        status="finished",
        traces=[*range(len(read))],
        next_start=next_start,
        lacks_older=lacks_older,
    )
    return one, RoutesReply(found=[], heads=heads, arrays=list(members.values()), spec=read[0][1])


def _index(one: _Candidate) -> int:
    return one.index


def _room(chosen: list[_Candidate], start: int, max_bytes: int) -> int:
    """Return how many rows of each there is room for, at least one."""
    first, _ = chosen[0].page(start, 1)
    row_bytes = max(1, first.size_bytes)
    num = sum(one.num_tokens - 1 > start for one in chosen)
    return max(1, (max_bytes - len(chosen) * TRACE_BYTES) // (max(1, num) * row_bytes))
