"""Traces on disk, until a file is written of them: memory does not grow with their rows."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import orjson

from moescope import formats
from moescope.errors import FormatError
from moescope.trace import RouteTrace, Source

Array = npt.NDArray[Any]
Server = dict[str, Any]
"""``device`` and ``seed`` of the server, as the meta line of a log has them; empty if unknown."""


class Disk:
    """Arrays in a file without a name: however the process ends, nothing is left of it.

    Args:
        folder: The directory of the file.

    Raises:
        OSError: The directory cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed in close
        self._file: IO[bytes] = file
        self._end = 0

    def close(self) -> None:
        """Give the room back."""
        self._file.close()

    def put(self, array: Array) -> Place:
        """Store an array."""
        place = Place(self._end, array.dtype, array.shape)
        self._file.seek(self._end)
        self._end += self._file.write(np.ascontiguousarray(array).data)
        return place

    def get(self, place: Place) -> Array:
        """Return an array, which cannot be written to."""
        self._file.seek(place.start)
        size_bytes = int(np.prod(place.shape)) * place.dtype.itemsize
        return np.frombuffer(self._file.read(size_bytes), place.dtype).reshape(place.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where an array is, and what."""

    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A trace on disk."""

    meta: dict[str, Any]
    """`moescope.formats.meta_of` and ``num_rows``; ``prompt_len`` is None where it is unknown."""
    places: dict[str, Place]


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A trace as a file has it."""

    trace: RouteTrace
    knows_prompt: bool = True
    """Whether it is known which tokens are the prompt's: where not, ``prompt_len`` is 0."""
    done: float = 1.0
    """The part of the file that is read with it, 0 to 1."""


class Spool:
    """Traces of one model on disk; a context manager.

    Args:
        folder: The directory where they lie, in a file without a name.
        server: Of the server that they are from.
    """

    def __init__(self, folder: Path, server: Server | None = None) -> None:
        self.server: Server = server or {}
        self.entries: list[Entry] = []
        self._disk = Disk(folder)
        self._first: RouteTrace | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._disk.close()

    def add(self, kept: Kept) -> Entry:
        """Store a trace.

        Raises:
            FormatError: It is of another model, or of other layers, than those before it.
            OSError: The disk is full.
        """
        trace = kept.trace
        self._first = self._first or trace.page(trace.start, 0)
        formats.check_alike([self._first, trace])
        for name in ("model", "num_experts"):
            first, this = getattr(self._first, name), getattr(trace, name)
            if first != this:
                raise FormatError(
                    f"traces in one file must share {name}: {trace.request_id!r} has {this}, "
                    f"{self._first.request_id!r} has {first}"
                )
        meta = {**formats.meta_of([trace])[0], "num_rows": trace.num_rows}
        if not kept.knows_prompt:
            meta["prompt_len"] = None
        arrays = {
            "topk_ids": trace.topk_ids.astype(formats.id_dtype(trace.num_experts), copy=False),
            "topk_weights": trace.topk_weights,
            "source": trace.source,
            "weights_versions": trace.weights_versions,
            "token_ids": trace.token_ids,
            "tokens": None
            if trace.tokens is None
            else np.frombuffer(orjson.dumps(trace.tokens), np.uint8),
        }
        places = {name: self._disk.put(one) for name, one in arrays.items() if one is not None}
        entry = Entry(meta, places)
        self.entries.append(entry)
        return entry

    def stored(self, entries: Iterable[Entry] | None = None) -> Stored:
        """Return what a file is written of.

        Args:
            entries: Which traces, in their order; all where None.
        """
        chosen = self.entries if entries is None else [*entries]
        layers = self._first.layers if self._first else np.empty(0, np.int32)
        return Stored(self._disk, chosen, layers, self.server)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Traces of one model on disk, in an order; they can be read any number of times."""

    disk: Disk
    entries: list[Entry]
    layers: npt.NDArray[np.int32]
    server: Server

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """Return the dtype that holds an array of all traces; None where none has it."""
        found = {one.places[name].dtype for one in self.entries if name in one.places}
        return np.result_type(*found) if found else None

    @property
    def top_k(self) -> int:
        """Experts a token and layer; 0 without any trace."""
        return int(self.entries[0].places["topk_ids"].shape[2]) if self.entries else 0

    @property
    def num_rows(self) -> int:
        """Rows of all traces."""
        return sum(one.meta["num_rows"] for one in self.entries)

    @property
    def num_missing(self) -> int:
        """Rows of all traces that are missing."""
        sources = (one for one in self.arrays("source") if one is not None)
        return sum(int((one == Source.MISSING).sum()) for one in sources)

    @property
    def metas(self) -> list[dict[str, Any]]:
        """What is not in arrays, of each trace."""
        return [one.meta for one in self.entries]

    def lengths(self, name: str) -> list[int]:
        """Return the length of an array of each trace; 0 where a trace does not have it."""
        places = [one.places.get(name) for one in self.entries]
        return [place.shape[0] if place else 0 for place in places]

    def arrays(self, name: str) -> Iterator[Array | None]:
        """Yield an array of each trace; None where a trace does not have it."""
        for one in self.entries:
            place = one.places.get(name)
            yield None if place is None else self.disk.get(place)

    def splits(self, name: str) -> npt.NDArray[np.int64]:
        """Return where each trace's part begins in an array of all, and its end."""
        return np.array([*itertools.accumulate(self.lengths(name), initial=0)], np.int64)

    def traces(self) -> Iterator[tuple[dict[str, Any], RouteTrace]]:
        """Yield each trace with its meta; where that has no ``prompt_len``, the trace's is 0."""
        for one in self.entries:
            has = {name: self.disk.get(place) for name, place in one.places.items()}
            text = has.pop("tokens", None)
            meta = {**one.meta, "prompt_len": one.meta["prompt_len"] or 0}
            for name in ("num_rows", "has_token_ids"):
                meta.pop(name)
            trace = RouteTrace(
                layers=self.layers,
                topk_ids=has["topk_ids"],
                topk_weights=has.get("topk_weights"),
                source=has["source"],
                weights_versions=has["weights_versions"],
                token_ids=has.get("token_ids"),
                tokens=None if text is None else orjson.loads(text.tobytes()),
                **meta,
            )
            yield one.meta, trace
