"""Joins the pages in which a server sends traces: its responses are bounded.

Nothing is fetched here: `all_pages` and `whole_batch` are generators that yield what the next page
shall hold and are sent that page.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar

import orjson

from moescope import formats
from moescope.batch import RoutesBatch
from moescope.errors import FormatError, TraceEvictedError
from moescope.received import MAX_BYTES, MAX_TOKENS, shown
from moescope.trace import RouteTrace

MAX_REQUESTS = 1024
"""Requests of which a server sends the routes in one response."""
MAX_IDS_BYTES = 2**20 - 4096
"""Bytes that the ids of a query may have as JSON, each of them twice: with its first row they are
its key. The server takes a body of 1 MiB."""
_START_BYTES = len(',"":,2147483647')

_Asked = TypeVar("_Asked")
_Page = TypeVar("_Page")
_T = TypeVar("_T")

TracesPage = tuple[list[RouteTrace], int | None]
"""Traces, and the first row that they lack; None: they have all."""


def driven(pages: Generator[_Asked, _Page, _T], fetch: Callable[[_Asked], _Page]) -> _T:
    """Return what the pages are together.

    Args:
        pages: `all_pages` or `whole_batch`.
        fetch: Returns the page that holds what it is given.
    """
    try:
        asked = next(pages)
        while True:
            asked = pages.send(fetch(asked))
    except StopIteration as end:
        joined: _T = end.value
        return joined


def load_page(data: bytes, max_bytes: int = MAX_BYTES) -> TracesPage:
    """Return the traces of an ``.npz``, and the first row that it leaves out; None: it has all.

    Args:
        data: The file.
        max_bytes: Bytes that its arrays may have.

    Raises:
        FormatError: The bytes are not an ``.npz`` of traces, or more than that.
    """
    arrays = formats.read_npz(data, max_bytes)
    traces, next_start = formats.traces_of(arrays, max_bytes), arrays.get("next_start")
    if next_start is None:
        return traces, None
    if next_start.shape or next_start.dtype.kind not in "iu":
        raise FormatError(
            f"not an .npz of traces: next_start is {next_start.dtype} of shape {next_start.shape}"
        )
    return traces, int(next_start)


def all_pages(start: int) -> Generator[int, TracesPage, list[RouteTrace]]:
    """Return the traces of one request, page by page: no more pages than rows.

    Yields the row that the next page begins at, and is sent the page.

    Args:
        start: The first row that is wanted.

    Raises:
        FormatError: The pages do not follow one another.
        TraceEvictedError: The trace made room for newer ones meanwhile.
    """
    pages = Pages()
    traces, next_start = yield start
    keys = pages.add(traces)
    _check_progress(start, next_start)
    while next_start is not None and not pages.are_whole(keys):
        start = next_start
        traces, next_start = yield start
        _check_progress(start, next_start)
        num_rows = pages.num_rows
        pages.add(traces, keys)
        if pages.num_rows == num_rows:
            pages.require_rows(keys, traces)
    return pages.joined(keys)


def whole_batch(
    request_ids: Iterable[str], starts: Mapping[str, int]
) -> Generator[Mapping[str, int], RoutesBatch, RoutesBatch]:
    """Return the routes of any number of requests, page by page.

    Yields the first row of each request in the next page, by id, and is sent the page. Every page
    ends a request or brings a row of one: there are no more pages than that.

    Args:
        request_ids: The ids.
        starts: The first row that is wanted of each.

    Raises:
        FormatError: The pages do not follow one another.
        TraceEvictedError: A trace made room for newer ones meanwhile.
    """
    status: dict[str, str] = {}
    truncated: set[str] = set()
    keys: dict[str, list[Key]] = {}
    pages = Pages()
    for chunk in _chunks(dict.fromkeys(request_ids)):
        asked = {request_id: starts.get(request_id, 0) for request_id in chunk}
        while asked:
            page = yield asked
            num_rows = pages.num_rows
            for request_id in asked:
                if request_id not in page.status:
                    raise FormatError(f"the response says nothing of {shown(request_id)!r}")
                status.setdefault(request_id, page.status[request_id])
                traces = page.traces.get(request_id, ())
                if keys.get(request_id):  # what came meanwhile under an old id is not wanted
                    pages.add(traces, keys[request_id])
                else:
                    keys[request_id] = pages.add(traces)
            truncated |= page.truncated & asked.keys()
            left = _left(page.next_start, asked)
            if pages.num_rows == num_rows and len(left) == len(asked):
                pages.require_rows([key for one in asked for key in keys[one]], _all(page))
            asked = {
                one: first
                for one, first in left.items()
                if not (keys[one] and pages.are_whole(keys[one]))
            }
    finished = [one for one, said in status.items() if said == "finished"]
    traces_of = {one: pages.joined(keys[one]) for one in finished}
    return RoutesBatch(status=status, traces=traces_of, truncated=frozenset(truncated))


def _left(next_start: Mapping[str, int], asked: Mapping[str, int]) -> Mapping[str, int]:
    """Return the first row that a page of a batch left out, by id, if it can be so."""
    for request_id, first in next_start.items():
        if first < asked.get(request_id, MAX_TOKENS + 1):
            raise FormatError(
                f"expected rows of {shown(request_id)!r} from {asked.get(request_id)} on, "
                f"got {first}"
            )
    return next_start


def _all(page: RoutesBatch) -> Iterator[RouteTrace]:
    return itertools.chain.from_iterable(page.traces.values())


Key = tuple[tuple[str, float, int], int]
"""A `RouteTrace.key`, and which trace of that key in its response: beam search has several."""


class Pages:
    """The pages of some traces, each trace's in the order of their rows.

    Attributes:
        num_rows: Rows that are here.
    """

    def __init__(self) -> None:
        self._pages: dict[Key, list[RouteTrace]] = {}
        self._joined: dict[Key, RouteTrace] = {}
        self.num_rows = 0

    def add(self, traces: Iterable[RouteTrace], wanted: Container[Key] | None = None) -> list[Key]:
        """Take pages in; return whose they are.

        Args:
            traces: The pages.
            wanted: Whose pages are taken; everyone's where None.

        Raises:
            FormatError: A page does not fit the one before it.
        """
        keys = []
        for key, page in _numbered(traces):
            if wanted is not None and key not in wanted:
                continue
            keys.append(key)
            known = self._pages.setdefault(key, [])
            if not known or _end(known[-1]) == page.start < page.num_tokens - 1:
                if known and _form(page) != _form(known[0]):
                    raise FormatError(
                        f"a page of {shown(page.key)} has another form than the one before it: "
                        f"{_form(page)}, not {_form(known[0])}"
                    )
                known.append(page)
                self.num_rows += page.num_rows
        return keys

    def are_whole(self, keys: Iterable[Key]) -> bool:
        """Return whether the last rows of traces are here."""
        return all(_is_whole(self._pages[key]) for key in keys)

    def require_rows(self, keys: Iterable[Key], traces: Iterable[RouteTrace]) -> NoReturn:
        """Raise why a page brought no row.

        Args:
            keys: Whose rows are wanted.
            traces: What the page brought.

        Raises:
            FormatError: The server sends the same again and again, or nothing.
            TraceEvictedError: The page has others in place of a trace.
        """
        brought = {key for key, _ in _numbered(traces)}
        if brought:
            for key in keys:
                if key not in brought and not _is_whole(self._pages[key]):
                    raise _gone(key)
        raise FormatError("the server sends no row of what is asked for")

    def joined(self, keys: Iterable[Key]) -> list[RouteTrace]:
        """Return traces as a whole.

        Raises:
            TraceEvictedError: The last rows of one are missing.
        """
        for key in keys:
            if key not in self._joined:
                pages = self._pages[key]
                if not _is_whole(pages):
                    raise _gone(key)
                self._joined[key] = RouteTrace.joined(pages)
        return [self._joined[key] for key in keys]


def _gone(key: Key) -> TraceEvictedError:
    return TraceEvictedError(
        f"the trace of {shown(key[0][0])!r}, index {key[0][2]}, made room for newer ones while it "
        "was fetched: fetch it sooner, or see --routes-memory",
        410,
    )


def _form(page: RouteTrace) -> tuple[object, ...]:
    """Return what all pages of a trace share."""
    weights = page.topk_weights
    return (
        page.num_tokens,
        page.topk_ids.dtype.name,
        page.topk_ids.shape[1:],
        weights is not None and weights.dtype.name,
        page.token_ids is not None,
        page.tokens is not None,
    )


def _is_whole(pages: Sequence[RouteTrace]) -> bool:
    return _end(pages[-1]) >= pages[-1].num_tokens - 1


def _numbered(traces: Iterable[RouteTrace]) -> Iterator[tuple[Key, RouteTrace]]:
    seen: collections.Counter[tuple[str, float, int]] = collections.Counter()
    for trace in traces:
        yield (trace.key, seen[trace.key]), trace
        seen[trace.key] += 1


def _end(page: RouteTrace) -> int:
    return page.start + page.num_rows


def _check_progress(start: int, next_start: int | None) -> None:
    if next_start is not None and next_start <= start:
        raise FormatError(f"expected a page behind row {start}, got {next_start}")


def _chunks(request_ids: Iterable[str]) -> Iterator[list[str]]:
    """Yield ids that fit into one query, their first rows included."""
    chunk: list[str] = []
    chunk_bytes = 0
    for request_id in request_ids:
        size_bytes = 2 * len(orjson.dumps(request_id)) + _START_BYTES
        if chunk and (len(chunk) == MAX_REQUESTS or chunk_bytes + size_bytes > MAX_IDS_BYTES):
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(request_id)
        chunk_bytes += size_bytes
    if chunk:
        yield chunk
