"""Reads the traces of a route log, as far as it and its run directory say what they are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope import formats, routes_log, version_runs
from moescope.analyze.batches import Model
from moescope.analyze.read_log import Known
from moescope.trace import RouteTrace, Source
from moescope.view.shown import TRACE_BYTES, Selection, Shown

_FIRST_ROWS = 16


def read(
    path: Path,
    selection: Selection,
    known: Mapping[str, Known],
    num_experts: int | None,
    top_k: int | None,
) -> None:
    """Read a route log: once for what it is of, and once for its rows.

    Args:
        path: The log.
        selection: Where its requests go.
        known: What is known of them besides, by their id.
        num_experts: Routed experts a layer, for a log that does not say it.
        top_k: Experts a token and layer, for a log that does not say it.

    Raises:
        CommandError: It is of another model than the inputs before it, or has too many rows.
        FormatError: It is no route log.
    """
    logged = routes_log.read(path, num_experts, top_k)
    model = Model(
        layers=tuple(logged.layers),
        num_experts=logged.num_experts,
        top_k=logged.meta["top_k"],
        name=logged.meta["model_id"],
    )
    selection.enter(path, model)
    drafts: dict[tuple[str, int], _Draft] = {}
    size = 0
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(orjson.JSONDecodeError):  # cut off, or counted before
                record = orjson.loads(line)
                if record.get("type") == "meta" or not selection.wants(record["req_id"]):
                    continue
                key = record["req_id"], record.get("index", 0)
                if key not in drafts:
                    drafts[key] = _Draft(model)
                draft = drafts[key]
                size += draft.bytes_for(record)
                selection.check(size)  # positions may be far apart
                draft.add(record)
    for (request_id, index), draft in drafts.items():
        selection.add(draft.shown(request_id, index, known.get(request_id), selection))


class _Draft:
    """The lines of one sequence."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._columns = {layer: column for column, layer in enumerate(model.layers)}
        shape = (0, len(model.layers), model.top_k)
        self._ids: npt.NDArray[Any] = np.zeros(shape, formats.id_dtype(model.num_experts))
        self._weights: npt.NDArray[np.float32] | None = np.zeros(shape, np.float32)
        self._here = np.zeros(shape[:2], np.bool_)
        self._texts: dict[int, str] = {}
        self._versions: dict[int, int] = {}
        self.num_rows = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with weights."""
        ids = len(self._model.layers) * self._model.top_k
        return ids * (self._ids.itemsize + np.dtype(np.float32).itemsize)

    def bytes_for(self, record: Mapping[str, Any]) -> int:
        """Return how many bytes a line adds."""
        row = record["token_idx"]
        size: int = max(row + 1 - self.num_rows, 0) * self.row_bytes
        if row not in self._texts:
            size += len(record.get("token") or "")
        return size if self.num_rows else size + TRACE_BYTES

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a line."""
        row, column = record["token_idx"], self._columns[record["layer"]]
        if row < 0:
            raise ValueError(f"token_idx is {row}")
        self._grow(row + 1)
        if record.get("token") is not None:
            self._texts.setdefault(row, str(record["token"]))
        if record.get("weights_version") is not None:
            self._versions[row] = record["weights_version"]
        if record["topk_ids"] is None:
            return
        self._ids[row, column] = record["topk_ids"]
        self._here[row, column] = True
        if record.get("topk_weights") is None:
            self._weights = None
        elif self._weights is not None:
            self._weights[row, column] = record["topk_weights"]

    def _grow(self, num_rows: int) -> None:
        self.num_rows = max(self.num_rows, num_rows)
        if num_rows > len(self._here):
            more = max(num_rows, 2 * len(self._here), _FIRST_ROWS) - len(self._here)
            self._ids, self._here = _padded(self._ids, more), _padded(self._here, more)
            self._weights = None if self._weights is None else _padded(self._weights, more)

    def shown(
        self, request_id: str, index: int, known: Known | None, selection: Selection
    ) -> Shown:
        """Return the trace; rows that lack lines are missing.

        Raises:
            CommandError: There is no room for it.
        """
        token_ids = known.token_ids if known else None
        prompt_len = known.prompt_len if known else 0
        num_tokens = len(token_ids) if token_ids else max(self.num_rows + 1, prompt_len)
        selection.check((num_tokens - 1) * self.row_bytes)
        self._grow(num_tokens - 1)
        rows = slice(self.num_rows)
        is_whole = self._here[rows].all(axis=1)
        versions = [self._versions.get(row) for row in range(self.num_rows)]
        trace = RouteTrace(
            request_id=request_id,
            index=index,
            model=self._model.name or "",
            num_experts=self._model.num_experts,
            num_hidden_layers=max(self._model.layers) + 1,
            layers=np.array(self._model.layers, np.int32),
            topk_ids=self._ids[rows],
            topk_weights=None if self._weights is None else self._weights[rows],
            source=np.where(is_whole, Source.COMPUTED, Source.MISSING).astype(np.uint8),
            weights_versions=version_runs.runs_of(
                np.array([one or 0 for one in versions], np.int64),
                is_whole & np.array([one is not None for one in versions], np.bool_),
                0,
            ),
            token_ids=np.array(token_ids, np.int32) if token_ids else None,
            prompt_len=prompt_len,
            num_tokens=num_tokens,
            cached_len=0,
            finish_reason=known.finish_reason if known else None,
            complete=bool(is_whole.all()),
            created_s=math.nan,
        ).check_values()
        texts = [self._texts.get(position) for position in range(num_tokens)]
        return Shown(
            trace=trace, tokens=texts if self._texts else None, has_phases=known is not None
        )


def _padded(array: npt.NDArray[Any], more: int) -> npt.NDArray[Any]:
    return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])
