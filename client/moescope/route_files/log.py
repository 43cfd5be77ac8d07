"""Reads route logs as traces, and writes traces as a route log.

A log says less than a trace: `UNSAID`. What a run directory knows of its requests is put in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from moescope import formats, routes_log, version_runs
from moescope.errors import FormatError
from moescope.route_files.known import Known
from moescope.route_files.spool import Disk, Kept, Place, Server, Stored
from moescope.trace import RouteTrace, Source

UNSAID = (
    "token ids, prompt lengths, last tokens, finish reasons, times, versions of moescope, labels "
    "of weights, and which rows are cached"
)
_FLUSH_CELLS = 2**22
_MAX_OPEN_ROWS = 200_000
_MAX_LACKING_CELLS = 2**27
_VERSIONS = ("vllm", "torch")
_NO_VERSION = version_runs.MIXED - 1


def write(path: Path, stored: Stored) -> None:
    """Write a meta line, and one line a token and layer."""
    first = (
        stored.metas[0] if stored.metas else {"model": None, "versions": {}, "num_experts": None}
    )
    with path.open("wb") as file:
        file.write(
            formats.meta_line(
                model=first["model"],
                versions=first["versions"],
                device=stored.server.get("device"),
                seed=stored.server.get("seed"),
                layers=stored.layers.tolist(),
                top_k=stored.top_k,
                num_experts=first["num_experts"],
            )
        )
        for _, trace in stored.traces():
            file.writelines(formats.route_lines(trace))


def read(
    path: Path,
    known: Mapping[str, Known],
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    folder: Path | None = None,
) -> tuple[Server, Iterator[Kept]]:
    """Return what a log says of its server, and its traces: read once for what it is of.

    Args:
        path: The log.
        known: What is known of its requests, by their id.
        num_experts: Routed experts a layer, for a log that does not say it.
        top_k: Experts a token and layer, for a log that does not say it.
        folder: Where the rows lie meanwhile, in a file without a name; that of the log where None.

    Raises:
        FormatError: It is no route log, or the lines of a token are too far from each other.
    """
    logged = routes_log.read(path, num_experts, top_k)
    server = {name: logged.meta[name] for name in ("device", "seed")}
    return server, _traces(path, logged, known, folder or path.parent)


def _traces(
    path: Path, logged: routes_log.LoggedRoutes, known: Mapping[str, Known], folder: Path
) -> Iterator[Kept]:
    disk = Disk(folder)
    with contextlib.closing(disk), path.open("rb") as file:
        sequences = _Sequences(logged, disk)
        for number, line in enumerate(file, start=1):
            with contextlib.suppress(orjson.JSONDecodeError):  # cut off: it was counted
                sequences.add(orjson.loads(line), number)
        sequences.flush(is_last=True)
        for number, name in enumerate(sequences.pieces, start=1):
            trace, knows_prompt = _trace(sequences.rows(name), name, logged, known.get(name[0]))
            yield Kept(trace, knows_prompt, number / len(sequences.pieces))


_Name = tuple[str, int, int]
"""Request id, index, and which sequence of those that the log has of them."""


class _Rows(NamedTuple):
    """Rows of a sequence as arrays, ``[num_rows, …]``."""

    positions: np.ndarray[Any, np.dtype[np.int64]]
    ids: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]
    """Zero where a line has none, or its row is missing."""
    has_weights: np.ndarray[Any, np.dtype[np.bool_]]
    versions: np.ndarray[Any, Any]
    """`_NO_VERSION` where a line has none."""
    present: np.ndarray[Any, np.dtype[np.bool_]]
    texts: np.ndarray[Any, np.dtype[np.uint8]]
    """JSON of a list of the tokens' text, with None where a line has none."""


class _Sequences:
    """Puts the lines of tokens together, and tokens that have all lines on disk by sequence.

    Positions rise within a sequence: where they do not, an id was used again.

    Args:
        logged: What the log is of.
        disk: Where to.

    Attributes:
        pieces: Where the rows of each sequence are, in the order of their first lines.
    """

    def __init__(self, logged: routes_log.LoggedRoutes, disk: Disk) -> None:
        self._columns = {layer: column for column, layer in enumerate(logged.layers)}
        self._top_k, self._disk = int(logged.meta["top_k"]), disk
        self._dtype = formats.id_dtype(logged.num_experts)
        self._open: dict[tuple[str, int, int], list[Any]] = {}
        self._last: dict[tuple[str, int], tuple[int, int]] = {}
        self._waiting: dict[_Name, list[tuple[int, list[Any]]]] = {}
        self._num_waiting = 0
        self.pieces: dict[_Name, list[list[Place]]] = {}

    def add(self, record: dict[str, Any], number: int) -> None:
        """Take a line.

        Raises:
            FormatError: Too many tokens lack lines.
        """
        if record.get("type") == "meta":
            return
        key = (record["req_id"], record.get("index", 0), record["token_idx"])
        lines = self._open.setdefault(key, [None] * len(self._columns))
        lines[self._columns[record["layer"]]] = record
        if None not in lines:
            self._take(*self._open_row(key))
        if len(self._open) > _MAX_OPEN_ROWS:
            raise FormatError(
                f"line {number}: {len(self._open):,} tokens lack lines of layers so far: those of "
                "a token must be near each other"
            )

    def _open_row(self, key: tuple[str, int, int]) -> tuple[tuple[str, int], int, list[Any]]:
        return key[:2], key[2], self._open.pop(key)

    def _take(self, of: tuple[str, int], position: int, lines: list[Any]) -> None:
        which, last = self._last.get(of, (0, -1))
        if None not in lines:  # what lacks lines comes last, whatever its position
            which += position <= last
            self._last[of] = (which, position)
        self._waiting.setdefault((*of, which), []).append((position, lines))
        self._num_waiting += 1
        if self._num_waiting * len(self._columns) * self._top_k >= _FLUSH_CELLS:
            self.flush()

    def flush(self, *, is_last: bool = False) -> None:
        """Put what waits on disk; at the end tokens that lack lines too, as missing rows."""
        if is_last:
            for key in sorted(self._open, key=lambda key: key[2]):
                self._take(*self._open_row(key))
        for name, rows in self._waiting.items():
            places = [self._disk.put(one) for one in self._arrays(rows)]
            self.pieces.setdefault(name, []).append(places)
        self._waiting, self._num_waiting = {}, 0

    def _arrays(self, rows: list[tuple[int, list[Any]]]) -> _Rows:
        shape = (len(rows), len(self._columns), self._top_k)
        ids, weights = np.zeros(shape, self._dtype), np.zeros(shape, np.float32)
        has_weights = np.zeros(len(rows), np.bool_)
        versions, present = np.full(len(rows), _NO_VERSION), np.zeros(len(rows), np.bool_)
        texts = []
        for place, (_, lines) in enumerate(rows):
            there = next(line for line in lines if line is not None)
            texts.append(there.get("token"))
            if any(line is None or line["topk_ids"] is None for line in lines):
                continue
            present[place] = True
            ids[place] = [line["topk_ids"] for line in lines]
            version = there.get("weights_version")
            versions[place] = _NO_VERSION if version is None else version
            some = [line.get("topk_weights") for line in lines]
            if None not in some:
                weights[place], has_weights[place] = some, True
        positions = np.array([position for position, _ in rows], np.int64)
        text = np.frombuffer(orjson.dumps(texts), np.uint8)
        return _Rows(positions, ids, weights, has_weights, versions, present, text)

    def rows(self, name: _Name) -> _Rows:
        """Return the rows of a sequence, in the order of their positions."""
        parts = [_Rows(*map(self._disk.get, places)) for places in self.pieces[name]]
        joined = [
            np.concatenate(arrays) for arrays in zip(*(one[:-1] for one in parts), strict=True)
        ]
        texts = [text for one in parts for text in orjson.loads(one.texts.tobytes())]
        order = np.argsort(joined[0], kind="stable")
        text = np.frombuffer(orjson.dumps([texts[place] for place in order]), np.uint8)
        return _Rows(*[*(array[order] for array in joined), text])


def _trace(
    rows: _Rows, name: _Name, logged: routes_log.LoggedRoutes, known: Known | None
) -> tuple[RouteTrace, bool]:
    """Return a sequence and whether its prompt is known; rows that have no lines are missing."""
    first, end = int(rows.positions[0]), int(rows.positions[-1]) + 1
    if known:
        end = max(end, known.num_tokens - 1)
    lacking = end - first - len(rows.positions)
    if lacking * len(logged.layers) * logged.meta["top_k"] > _MAX_LACKING_CELLS:
        raise FormatError(f"{name[0]!r} has lines of {len(rows.positions)} of {end - first} tokens")
    arrays = _arrays(rows, first, end - first)
    token_ids = np.array(known.token_ids, np.int32) if known and known.token_ids else None
    if token_ids is not None and len(token_ids) != end + 1:
        token_ids = None
    meta, has_all = logged.meta, bool((arrays["source"] != Source.MISSING).all())
    trace = RouteTrace(
        request_id=name[0],
        index=name[1],
        model=meta["model_id"] or "",
        num_experts=logged.num_experts,
        num_hidden_layers=max(logged.layers) + 1,
        layers=np.array(logged.layers, np.int32),
        start=first,
        **arrays,
        token_ids=None if token_ids is None else token_ids[first:],
        tokens=None if token_ids is None else _tokens(rows, token_ids[first:].tolist()),
        prompt_len=known.prompt_len if known else 0,
        num_tokens=end + 1,
        cached_len=0,
        finish_reason=known.finish_reason if known else None,
        complete=known is not None and first == 0 and has_all,
        created_s=0.0,
        versions={one: meta[f"{one}_version"] for one in _VERSIONS if meta[f"{one}_version"]},
    )
    return trace.check_values(), known is not None


def _arrays(rows: _Rows, first: int, num_rows: int) -> dict[str, Any]:
    """Return the arrays of a trace's rows, from row ``first`` on."""
    shape, places = (num_rows, *rows.ids.shape[1:]), rows.positions - first
    source = np.full(num_rows, Source.MISSING, np.uint8)
    source[places[rows.present]] = Source.COMPUTED
    ids, weights = np.zeros(shape, rows.ids.dtype), np.zeros(shape, np.float32)
    ids[places], weights[places] = rows.ids, rows.weights
    versions = np.full(num_rows, _NO_VERSION)
    versions[places] = rows.versions
    has_versions = (rows.versions[rows.present] != _NO_VERSION).all()
    return {
        "topk_ids": ids,
        "topk_weights": weights if rows.has_weights[rows.present].all() else None,
        "source": source,
        "weights_versions": version_runs.runs_of(versions, source != Source.MISSING, first)
        if has_versions
        else version_runs.unknown(),
    }


def _tokens(rows: _Rows, token_ids: list[int]) -> list[str] | None:
    """Return the text of the tokens, if every line has it.

    The last token has no line: its text is that of the same token before it, or else empty.
    """
    texts = orjson.loads(rows.texts.tobytes())
    if None in texts or len(texts) != len(token_ids) - 1:
        return None
    known = dict(zip(token_ids, texts, strict=False))
    return [*map(str, texts), str(known.get(token_ids[-1], ""))]
