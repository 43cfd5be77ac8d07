"""Writes a route log whose requests come in any order: the log has that of the prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import orjson

from moescope import files, formats, routes_log
from moescope.errors import CommandError, FormatError
from moescope.records import ServerInfo
from moescope.trace import RouteTrace

_COPY_BYTES = 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Lines of one request that follow one another in a file."""

    file: IO[bytes]
    start: int
    size_bytes: int


class LogDraft:
    """The lines of a route log until it is written; a context manager.

    They lie in a file without a name in the log's directory: memory does not grow with the log, and
    however the process ends, nothing is left of it.

    Args:
        path: The log.
        info: The server that the routes are from.
        layers: Global numbers of the layers that are logged, in the log's order.
        kept: What the log holds already, as `routes_log.read` says it; it is taken over.

    Raises:
        CommandError: What it holds is of another model, or of other layers.
        OSError: The directory cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        info: ServerInfo,
        layers: Iterable[int],
        kept: routes_log.LoggedRoutes | None = None,
    ) -> None:
        self.path, self.layers = path, list(layers)
        self._info = info
        self._pieces: dict[str, list[_Piece]] = {}
        if kept:
            self._require_fitting(kept)
        self._stack = contextlib.ExitStack()
        file = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed in __exit__
        self._file: IO[bytes] = self._stack.enter_context(file)
        if kept:
            self._keep()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pieces

    def _require_fitting(self, kept: routes_log.LoggedRoutes) -> None:
        model = self._info.model
        for what, has, expected in (
            ("the model", kept.meta["model_id"] or model, model),
            ("layers", kept.layers, self.layers),
        ):
            if has != expected:
                raise CommandError(
                    f"{self.path} is of {what} {_words(has)}, not {_words(expected)}: one log "
                    "does not hold both"
                )

    def _keep(self) -> None:
        file = self._stack.enter_context(self.path.open("rb"))
        start = 0
        sizes = ((_request_id(line), len(line)) for line in file)
        for request_id, lines in itertools.groupby(sizes, key=operator.itemgetter(0)):
            size_bytes = sum(size for _, size in lines)
            if request_id is not None:
                self._add_piece(request_id, _Piece(file, start, size_bytes))
            start += size_bytes

    def prepared(self, request_id: str, traces: Iterable[RouteTrace]) -> bytes:
        """Return `lines_of` the traces of a request, for `add`; in any thread."""
        return lines_of(request_id, traces, self.layers)

    def add(self, request_id: str, lines: bytes) -> None:
        """Take the lines of a request.

        Raises:
            OSError: They cannot be stored.
        """
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(lines)
        self._add_piece(request_id, _Piece(self._file, start, len(lines)))

    def _add_piece(self, request_id: str, piece: _Piece) -> None:
        self._pieces.setdefault(request_id, []).append(piece)

    def write(self, request_ids: Iterable[str]) -> None:
        """Write the log in place of the one that is there.

        Args:
            request_ids: The order of the requests; others follow.

        Raises:
            OSError: It cannot be written; the log stays as it was.
        """
        order = dict.fromkeys([*request_ids, *self._pieces])
        with files.replacing(self.path) as new, new.open("wb") as log:
            log.write(self._meta_line())
            for request_id in order:
                for piece in self._pieces.get(request_id, ()):
                    _copy(piece, log)

    def _meta_line(self) -> bytes:
        info = self._info
        return formats.meta_line(
            model=info.model,
            versions=info.versions,
            device=info.device,
            seed=info.seed,
            layers=self.layers,
            top_k=info.top_k,
            num_experts=info.num_experts,
        )


def lines_of(request_id: str, traces: Iterable[RouteTrace], layers: list[int]) -> bytes:
    """Return the lines of a request, under the id that its response has.

    Raises:
        FormatError: A trace has other layers.
    """
    lines: list[bytes] = []
    for trace in traces:
        require_layers(trace, layers)
        lines += formats.route_lines(dataclasses.replace(trace, request_id=request_id))
    return b"".join(lines)


def require_layers(trace: RouteTrace, layers: list[int]) -> None:
    """Check the layers of a trace.

    Raises:
        FormatError: It has others.
    """
    if trace.layers.tolist() != layers:
        raise FormatError(f"expected layers {_words(layers)}, got {_words(trace.layers.tolist())}")


def _request_id(line: bytes) -> str | None:
    """Return whose line it is; None of a meta line and of one that was cut off."""
    with contextlib.suppress(orjson.JSONDecodeError):
        request_id: str | None = orjson.loads(line).get("req_id")
        return request_id
    return None


def _copy(piece: _Piece, log: IO[bytes]) -> None:
    piece.file.seek(piece.start)
    left = piece.size_bytes
    while left:
        part = piece.file.read(min(left, _COPY_BYTES))
        if not part:
            raise OSError("the route log was cut while it was copied")
        log.write(part)
        left -= len(part)


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
