"""Collects the traces of a replay, whose requests come in any order, for a file of any format."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from moescope import files, route_files
from moescope.errors import CommandError
from moescope.log_draft import require_layers
from moescope.records import ServerInfo
from moescope.route_files.spool import Entry, Kept, Spool
from moescope.trace import RouteTrace


class TracesDraft:
    """The traces of a file of routes until it is written; a context manager.

    As `moescope.log_draft.LogDraft`, for the other formats: they lie in a file without a name.

    Args:
        path: The file; its suffix says the format.
        info: The server that the routes are from.
        layers: Global numbers of the layers that are kept.
        keep: Whether to take over what the file holds.

    Raises:
        CommandError: What it holds is of another model, or of other layers.
        FormatError: It holds something else.
        OSError: The directory cannot be written to.
    """

    def __init__(
        self, path: Path, info: ServerInfo, layers: Iterable[int], *, keep: bool = False
    ) -> None:
        self.path, self.layers = path, list(layers)
        self._entries: dict[str, list[Entry]] = {}
        self._stack = contextlib.ExitStack()
        server = {"device": info.device, "seed": info.seed}
        self._spool = self._stack.enter_context(Spool(path.parent, server))
        if keep:
            with self._stack.pop_all() as stack:
                self._keep(info.model)
                self._stack = stack.pop_all()

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
        return request_id in self._entries

    def _keep(self, model: str) -> None:
        _, traces = route_files.read(self.path)
        for kept in traces:
            for what, has, expected in (
                ("the model", kept.trace.model, model),
                ("layers", kept.trace.layers.tolist(), self.layers),
            ):
                if has != expected:
                    raise CommandError(
                        f"{self.path} is of {what} {has}, not {expected}: one file does not hold "
                        "both"
                    )
            self.add(kept.trace.request_id, [kept])

    def prepared(self, request_id: str, traces: Iterable[RouteTrace]) -> list[Kept]:
        """Return the traces of a request under the id that its response has, for `add`.

        Raises:
            FormatError: A trace has other layers.
        """
        named = [dataclasses.replace(trace, request_id=request_id) for trace in traces]
        for trace in named:
            require_layers(trace, self.layers)
        return [*map(Kept, named)]

    def add(self, request_id: str, traces: Iterable[Kept]) -> None:
        """Take the traces of a request.

        Raises:
            FormatError: They are of another model than those before.
            OSError: They cannot be stored.
        """
        stored = [self._spool.add(kept) for kept in traces]
        self._entries.setdefault(request_id, []).extend(stored)

    def write(self, request_ids: Iterable[str]) -> None:
        """Write the file in place of the one that is there.

        Args:
            request_ids: The order of the requests; others follow.

        Raises:
            OSError: It cannot be written; the file stays as it was.
        """
        order = dict.fromkeys([*request_ids, *self._entries])
        entries = [entry for one in order for entry in self._entries.get(one, ())]
        with files.replacing(self.path) as new:
            route_files.write(new, self._spool.stored(entries))
