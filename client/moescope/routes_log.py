"""Reads a route log: a meta line, then one JSON line a routed token and layer.

The schema is that of ``VLLM_LOG_MOE``, so what a server writes is read here as well as what
``moescope replay`` writes (`moescope.log_draft`), and logs of other writers that say less.
"""

from __future__ import annotations

import array
import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope.errors import FormatError
from moescope.received import MAX_EXPERTS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoggedRoutes:
    """Counts of a route log."""

    meta: dict[str, Any]
    """The fields of the meta line; None where the log does not say them, but for those that
    ``inferred`` speaks of."""
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
    inferred: tuple[str, ...] = ()
    """What no meta line says and the records were taken for, in words."""

    @property
    def num_experts(self) -> int:
        """Routed experts a layer."""
        return int(self.counts.shape[1])


def read(path: Path, num_experts: int | None = None, top_k: int | None = None) -> LoggedRoutes:
    """Count the selections in a route log.

    What no meta line says is inferred from the records. A line may be cut off where a server was
    killed: the last one, or the one before the meta line of the next server.

    Args:
        path: The log.
        num_experts: Routed experts a layer, for a log that does not say it.
        top_k: Experts a token and layer, for a log that does not say it.

    Raises:
        FormatError: The file is not a route log, contradicts itself or the arguments, or has too
            little to infer from.
    """
    given = {"num_experts": num_experts, "top_k": top_k}
    reader = _Reader({name: value for name, value in given.items() if value is not None})
    try:
        with path.open("rb") as file:
            lines = itertools.pairwise(itertools.chain(file, (b"",)))
            for number, (line, following) in enumerate(lines, start=1):
                try:
                    reader.add(line, following)
                except KeyError as error:
                    raise FormatError(f"{path}, line {number}: it has no {error}") from error
                except (AttributeError, TypeError, ValueError, OverflowError) as error:
                    raise FormatError(f"{path}, line {number}: not a route: {error}") from error
        return reader.result()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    except _UnusableError as error:
        raise FormatError(f"{path} {error}") from error


class _UnusableError(Exception):
    """A log as a whole cannot be used; the message goes on where the path ends."""


_META: dict[str, type] = {
    "model_id": str,
    "vllm_version": str,
    "torch_version": str,
    "device": str,
    "seed": int,
    "layers_logged": list,
    "top_k": int,
    "num_experts": int,
}
"""The fields of a meta line, and their types; one that is null is not said."""
_SAME = ("model_id", "layers_logged", "top_k", "num_experts")
"""Fields that are the same in all meta lines of a log."""
_META_START = re.compile(rb'\s*\{\s*"type"\s*:\s*"meta"')


class _Tally:
    """Counts the ids of a layer, some ten thousand at a time."""

    _FOLD = 2**16

    def __init__(self) -> None:
        self._counts = np.zeros(0, np.int64)
        self._ids = array.array("H")

    def extend(self, ids: list[int]) -> None:
        self._ids.extend(ids)
        if len(self._ids) >= self._FOLD:
            self._fold()

    def _fold(self) -> None:
        found = np.bincount(np.frombuffer(self._ids, np.uint16), minlength=len(self._counts))
        found[: len(self._counts)] += self._counts
        self._counts, self._ids = found, array.array("H")

    def counts(self) -> npt.NDArray[np.int64]:
        """Return the selections up to the highest expert, ``[highest + 1]``."""
        self._fold()
        return self._counts


class _Reader:
    """Collects the lines of a log.

    Args:
        said: Fields of the meta line that are known without one.
    """

    def __init__(self, said: dict[str, Any]) -> None:
        self._said = said
        self._top_k: int | None = said.get("top_k")
        self._ids: dict[int, _Tally] = {}
        self._first_layer: int | None = None
        self._sequences: set[tuple[str, int]] = set()
        self._lines = self._rows = self._missing = self._torn = 0

    def add(self, line: bytes, following: bytes) -> None:
        self._lines += 1
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            is_last = not (following or line.endswith(b"\n"))
            if not is_last and not _META_START.match(following):
                raise
            self._torn += 1
            return
        if record.get("type") == "meta":
            self._add_meta(record)
        else:
            self._add_route(record)

    def _add_meta(self, record: dict[str, Any]) -> None:
        for name, kind in _META.items():
            value = record.get(name)
            if value is None:
                continue
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {value!r} in the meta line")
            if self._said.setdefault(name, value) != value and name in _SAME:
                raise ValueError(f"{name} is {value} in the meta line, not {self._said[name]}")
        layers = self._said.get("layers_logged")
        if layers is not None:
            ids = {layer: self._ids.pop(layer, _Tally()) for layer in layers}
            if self._ids:
                raise ValueError(f"layer {next(iter(self._ids))} is not in layers_logged {layers}")
            self._ids = ids
        top_k = self._said.get("top_k")
        if top_k is not None and self._top_k not in (None, top_k):
            raise ValueError(f"top_k is {top_k} in the meta line, not {self._top_k}")
        self._top_k = top_k or self._top_k

    def _add_route(self, record: dict[str, Any]) -> None:
        layer, ids, request_id = record["layer"], record["topk_ids"], record["req_id"]
        if layer not in self._ids:
            if "layers_logged" in self._said:
                raise ValueError(f"layer {layer} is not in the meta line's layers_logged")
            if not isinstance(layer, int):
                raise TypeError(f"layer is {layer!r}")
            self._ids[layer] = _Tally()
        if ids is not None:
            if len(ids) != (self._top_k or len(ids)):
                raise ValueError(f"topk_ids has {len(ids)} experts, and top_k is {self._top_k}")
            self._top_k = len(ids)
            self._ids[layer].extend(ids)
        if self._first_layer is None:
            self._first_layer = layer
        if layer == self._first_layer:  # every row has one line a layer
            self._rows += 1
            self._missing += ids is None
            self._sequences.add((request_id, record.get("index", 0)))

    def result(self) -> LoggedRoutes:
        """Return the counts.

        Raises:
            _UnusableError: There is too little to infer from, or an expert that cannot be.
        """
        if not self._lines:
            raise _UnusableError("is empty: expected a meta line or a route")
        found = {layer: tally.counts() for layer, tally in self._ids.items()}
        num_experts = self._num_experts(found)
        if self._top_k is None:
            raise _UnusableError("names no expert, nor how many a token takes: add --top-k")
        padded = [np.pad(one, (0, num_experts - len(one))) for one in found.values()]
        known = {"layers_logged": [*found], "top_k": self._top_k, "num_experts": num_experts}
        return LoggedRoutes(
            meta={**dict.fromkeys(_META), **self._said, **known},
            layers=[*found],
            counts=np.array(padded, np.int64).reshape(len(found), num_experts),
            sequences=len(self._sequences),
            rows=self._rows,
            missing_rows=self._missing,
            torn_lines=self._torn,
            inferred=self._inferred(known),
        )

    def _num_experts(self, found: dict[int, npt.NDArray[np.int64]]) -> int:
        lengths = {layer: len(one) for layer, one in found.items()}
        num_experts = int(self._said.get("num_experts", max(lengths.values(), default=0)))
        if not num_experts and "num_experts" not in self._said:
            raise _UnusableError("names no expert, nor how many a layer has: add --num-experts")
        if not 0 < num_experts <= MAX_EXPERTS:
            raise _UnusableError(
                f"is of {num_experts} experts a layer: expected 1 to {MAX_EXPERTS}, whose ids take "
                "two bytes"
            )
        for layer, length in lengths.items():
            if length > num_experts:
                raise _UnusableError(
                    f"names expert {length - 1} in layer {layer}, of {num_experts} experts "
                    f"(0 to {num_experts - 1})"
                )
        return num_experts

    def _inferred(self, known: dict[str, Any]) -> tuple[str, ...]:
        words = {
            "layers_logged": f"layers {', '.join(map(str, known['layers_logged']))}",
            "top_k": f"top-{known['top_k']}",
            "num_experts": f"{known['num_experts']} experts a layer, by the highest that was "
            "selected: --num-experts says more",
        }
        return tuple(said for name, said in words.items() if name not in self._said)
