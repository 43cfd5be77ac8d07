"""A route log: a meta line, then one JSON line a routed token and layer.

The schema is that of ``VLLM_LOG_MOE``, so what the server writes is read here as well; see
`moescope.formats`.
"""

from __future__ import annotations

import array
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope import formats
from moescope._client import Client
from moescope.errors import FormatError, ServerError
from moescope.records import ServerInfo
from moescope.trace import RouteTrace


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What `fetch` wrote."""

    sequences: int
    """Traces written."""
    rows: int
    """Their rows: routed tokens."""
    missing_rows: int
    """Rows that were not captured; their ids are null in the log."""
    failed: dict[str, str]
    """The requests without routes: request id, and why."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoggedRoutes:
    """Counts of a route log."""

    meta: dict[str, Any]
    """The meta line."""
    layers: list[int]
    """Global layer numbers in the log."""
    counts: npt.NDArray[np.int64]
    """Selections, ``[num_layers, num_experts]``."""
    sequences: int
    """Sequences with at least one line."""
    rows: int
    """Routed tokens."""
    missing_rows: int
    """Routed tokens whose ids are null."""
    torn_lines: int
    """Lines cut off, where a server was killed while it wrote; what they said is not counted."""

    @property
    def num_experts(self) -> int:
        """Routed experts a layer."""
        return int(self.counts.shape[1])


def fetch(
    client: Client,
    request_ids: Iterable[str],
    path: Path,
    layers: str | None = None,
    on_fetched: Callable[[], None] | None = None,
) -> Fetched:
    """Fetch the routes of requests and write them as a route log.

    Args:
        client: The server's client.
        request_ids: Ids that the server gave in its responses.
        path: The log; an existing file is overwritten.
        layers: Layers to fetch, such as ``0,5-7``; all captured layers where None.
        on_fetched: Called after each request.

    Raises:
        MoescopeError: The server's ``/moescope/info`` does not answer. What fails for one
            request is noted in the result instead.
    """
    info = client.info()
    logged: list[int] | None = None
    failed: dict[str, str] = {}
    sequences = rows = missing = 0
    with path.open("wb") as file:
        for request_id in request_ids:
            traces: list[RouteTrace] = []
            try:
                traces = client.routes(request_id, layers=layers)
            except (ServerError, FormatError) as error:
                failed[request_id] = str(error)
            for trace in traces:
                if logged is None:
                    logged = trace.layers.tolist()
                    file.write(_meta_line(info, logged))
                file.writelines(formats.route_lines(trace))
                sequences += 1
                rows += trace.num_rows
                missing += trace.num_rows - int(trace.present.sum())
            if on_fetched:
                on_fetched()
        if logged is None:
            file.write(_meta_line(info, info.layers))
    return Fetched(sequences=sequences, rows=rows, missing_rows=missing, failed=failed)


def _meta_line(info: ServerInfo, layers: Sequence[int]) -> bytes:
    return formats.meta_line(
        model=info.model,
        versions=info.versions,
        device=info.device,
        seed=info.seed,
        layers=layers,
        top_k=info.top_k,
        num_experts=info.num_experts,
    )


def read(path: Path, num_experts: int | None = None) -> LoggedRoutes:
    """Count the selections in a route log.

    A line may be cut off where a server was killed: the last one, or the one before the meta line
    of the next server.

    Args:
        path: The log.
        num_experts: Routed experts a layer, for a log whose meta line does not say it.

    Raises:
        FormatError: The file is no route log, or does not say the number of experts.
    """
    reader = _Reader()
    try:
        with path.open("rb") as file:
            lines = itertools.pairwise(itertools.chain(file, (b"",)))
            for number, (line, following) in enumerate(lines, start=1):
                try:
                    reader.add(line, following)
                except KeyError as error:
                    raise FormatError(f"{path}, line {number}: it has no {error}") from error
                except (TypeError, ValueError, OverflowError) as error:
                    raise FormatError(f"{path}, line {number}: not a route: {error}") from error
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    meta = reader.meta
    if meta is None:
        raise FormatError(f"{path} is empty: no meta line")
    experts = meta.get("num_experts") or num_experts
    if experts is None:
        raise FormatError(
            f"the meta line of {path} does not say how many experts a layer has: "
            "give it with --num-experts"
        )
    return reader.result(meta, experts, path)


_META: dict[str, Any] = {
    "model_id": str,
    "vllm_version": str | None,
    "torch_version": str | None,
    "device": str,
    "seed": int | None,
    "layers_logged": list,
    "top_k": int,
}
"""What a meta line has."""
_META_START = b'{"type":"meta"'


class _Reader:
    """Collects the lines of a log; ids of each layer as two bytes each, counted at the end."""

    def __init__(self) -> None:
        self.meta: dict[str, Any] | None = None
        self._ids: dict[int, array.array[int]] = {}
        self._first_layer = 0
        self._sequences: set[tuple[str, int]] = set()
        self._rows = self._missing = self._torn = 0

    def add(self, line: bytes, following: bytes) -> None:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            is_last = not (following or line.endswith(b"\n"))
            if not is_last and not following.startswith(_META_START):
                raise
            self._torn += 1
            return
        if record["type"] == "meta":
            self._add_meta(record)
            return
        if self.meta is None:
            raise ValueError("the first line is no meta line")
        layer, ids = record["layer"], record["topk_ids"]
        if layer not in self._ids:
            raise ValueError(f"layer {layer} is not in the meta line's layers_logged")
        if ids is not None:
            self._ids[layer].extend(ids)
        if layer == self._first_layer:  # every row has one line a layer
            self._rows += 1
            self._missing += ids is None
            self._sequences.add((record["req_id"], record.get("index", 0)))

    def _add_meta(self, record: dict[str, Any]) -> None:
        for name, kind in _META.items():
            if not isinstance(record[name], kind):
                raise TypeError(f"{name} is {record[name]!r} in the meta line")
        if not isinstance(record.get("num_experts"), int | None):
            raise TypeError(f"num_experts is {record['num_experts']!r} in the meta line")
        if self.meta is None:
            self._ids = {layer: array.array("H") for layer in record["layers_logged"]}
            self._first_layer = record["layers_logged"][0] if self._ids else 0
            self.meta = record
            return
        for name in ("model_id", "layers_logged", "top_k"):  # a server that started again
            if record[name] != self.meta[name]:
                raise ValueError(f"a second meta line with another {name}: {record[name]}")

    def result(self, meta: dict[str, Any], num_experts: int, path: Path) -> LoggedRoutes:
        counts = np.zeros((len(self._ids), num_experts), np.int64)
        for row, (layer, ids) in enumerate(self._ids.items()):
            found = np.bincount(np.frombuffer(ids, np.uint16), minlength=num_experts)
            if len(found) > num_experts:
                raise FormatError(
                    f"{path} names expert {len(found) - 1} in layer {layer}, "
                    f"of {num_experts} experts (0 to {num_experts - 1})"
                )
            counts[row] = found
        return LoggedRoutes(
            meta=meta,
            layers=list(self._ids),
            counts=counts,
            sequences=len(self._sequences),
            rows=self._rows,
            missing_rows=self._missing,
            torn_lines=self._torn,
        )
