"""Reads a route log, and what a run directory knows of its requests."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from moescope import replay, routes_log
from moescope.analysis import NO_TOKEN, PHASES, Rows, request_number
from moescope.analyze.batches import Batch, Model
from moescope.errors import FormatError
from moescope.run_dir import RunDir

_MAX_OPEN_ROWS = 200_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a request besides its routes."""

    prompt_len: int
    token_ids: list[int] | None
    """Prompt and output."""
    finish_reason: str | None = None


def known_of(run_dir: RunDir) -> dict[str, Known]:
    """Return what a run directory's answers say of its requests, by their id.

    Raises:
        FormatError: The file of the answers is malformed.
    """
    if not run_dir.responses.exists():
        return {}
    known = {}
    for one in replay.read_responses(run_dir.responses):
        if one.request_id is not None and one.error is None:
            has_tokens = one.prompt_token_ids is not None and one.token_ids is not None
            tokens = [*(one.prompt_token_ids or ()), *(one.token_ids or ())]
            known[one.request_id] = Known(
                prompt_len=one.prompt_tokens,
                token_ids=tokens if has_tokens else None,
                finish_reason=one.finish_reason,
            )
    return known


def read(
    path: Path,
    label: str,
    *,
    known: Mapping[str, Known] | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
) -> Iterator[Batch]:
    """Read a route log: once for what it is of, and once for its rows.

    Args:
        path: The log.
        label: The label of the input.
        known: What is known of its requests, by their id.
        num_experts: Routed experts a layer, for a log that does not say it.
        top_k: Experts a token and layer, for a log that does not say it.

    Raises:
        FormatError: It is no route log, or the lines of a token are too far from each other.
    """
    logged = routes_log.read(path, num_experts, top_k)
    model = Model(
        layers=tuple(logged.layers),
        num_experts=logged.num_experts,
        top_k=logged.meta["top_k"],
        name=logged.meta["model_id"],
    )
    size_bytes = path.stat().st_size
    reader = _Reader(model, label, known or {})
    with path.open("rb") as file:
        done_bytes = 0
        for number, line in enumerate(file, start=1):
            done_bytes += len(line)
            with contextlib.suppress(
                orjson.JSONDecodeError
            ):  # cut off: the first reading counted it
                reader.add(orjson.loads(line))
            if reader.num_open > _MAX_OPEN_ROWS:
                raise FormatError(
                    f"line {number}: {reader.num_open:,} tokens lack lines of layers so far: "
                    "those of a token must be near each other"
                )
            if reader.num_rows >= model.batch_rows:
                yield reader.batch(done_bytes / size_bytes)
    yield reader.batch(1.0, is_last=True)


class _Reader:
    """Puts the lines of tokens together.

    Args:
        model: What the log is of.
        label: The label of the input.
        known: What is known of its requests.
    """

    def __init__(self, model: Model, label: str, known: Mapping[str, Known]) -> None:
        self._model, self._label, self._known = model, label, known
        self._columns = {layer: column for column, layer in enumerate(model.layers)}
        self._open: dict[tuple[str, int, int], list[Any]] = {}
        self._whole: list[tuple[tuple[str, int, int], list[Any]]] = []
        self._num_missing = 0

    @property
    def num_open(self) -> int:
        """Tokens that lack lines."""
        return len(self._open)

    @property
    def num_rows(self) -> int:
        """Tokens of the next batch."""
        return len(self._whole)

    def add(self, record: dict[str, Any]) -> None:
        """Take a line."""
        if record.get("type") == "meta":
            return
        key = (record["req_id"], record.get("index", 0), record["token_idx"])
        lines = self._open.setdefault(key, [None] * len(self._columns))
        lines[self._columns[record["layer"]]] = record
        if None in lines:
            return
        del self._open[key]
        if any(line["topk_ids"] is None for line in lines):
            self._num_missing += 1
        else:
            self._whole.append((key, lines))

    def batch(self, done: float, *, is_last: bool = False) -> Batch:
        """Return the tokens that have all lines, and begin anew."""
        whole, num_missing = self._whole, self._num_missing + is_last * self.num_open
        self._whole, self._num_missing = [], 0
        shape = (len(whole), len(self._model.layers), self._model.top_k)
        ids = [[line["topk_ids"] for line in lines] for _, lines in whole]
        weights = [[line.get("topk_weights") for line in lines] for _, lines in whole]
        has_weights = all(None not in one for one in weights) and bool(whole)
        places = [self._place(request_id, token) for (request_id, _, token), _ in whole]
        numbers = [request_number(request_id, self._label) for (request_id, _, _), _ in whole]
        rows = Rows(
            num_experts=self._model.num_experts,
            topk_ids=np.array(ids, np.uint16).reshape(shape),
            topk_weights=np.array(weights, np.float32).reshape(shape) if has_weights else None,
            token_ids=np.array([token for _, token in places], np.int32),
            positions=np.array([token for (_, _, token), _ in whole], np.int64),
            phases=np.array([phase for phase, _ in places], np.uint8),
            requests=np.array(numbers, np.uint64),
        )
        return Batch(model=self._model, rows=rows, num_missing=num_missing, done=done)

    def _place(self, request_id: str, position: int) -> tuple[int, int]:
        """Return the phase and the token id of a row."""
        known = self._known.get(request_id)
        if known is None:
            return PHASES.index("unknown"), NO_TOKEN
        phase = PHASES.index("prompt" if position < known.prompt_len else "output")
        tokens = known.token_ids
        return phase, NO_TOKEN if tokens is None or position >= len(tokens) else tokens[position]
