"""Files of routes in every format that keeps them, read and written one trace at a time.

``jsonl`` is the route log, ``npz`` the arrays of `moescope.formats`, ``arrow`` (an Arrow file) and
``parquet`` the tables of `moescope.arrow`. A file's suffix says its format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from moescope import columns_file, routes_log
from moescope.errors import CommandError
from moescope.filters import EVERY, Filter
from moescope.route_files import log, npz
from moescope.route_files.broken import named
from moescope.route_files.known import Known, known_of
from moescope.route_files.spool import Kept, Server, Spool, Stored
from moescope.run_dir import ROUTES_FORMATS

FORMATS = ROUTES_FORMATS
_COLUMNS = ("arrow", "parquet")

__all__ = [
    "FORMATS",
    "Kept",
    "Known",
    "Server",
    "Spool",
    "Stored",
    "check",
    "counted",
    "known_of",
    "named",
    "read",
    "write",
]


def check(form: str) -> None:
    """Check that a format is one, and that what it needs is installed.

    Raises:
        CommandError: It is none, or pyarrow is missing.
    """
    if form not in FORMATS:
        raise CommandError(
            f"invalid format {form!r}: expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    if form in _COLUMNS:
        columns_file.require()


def write(path: Path, stored: Stored, *, long: bool = False, missing: bool = False) -> None:
    """Write traces in the format of the file's suffix.

    Args:
        path: The file.
        stored: The traces.
        long: Whether a table has one row a selection (`moescope.arrow.long`), not one a token.
        missing: Whether that form has missing rows.

    Raises:
        OSError: The file cannot be written.
    """
    if path.suffix == ".npz":
        npz.write(path, stored)
    elif path.suffix == ".jsonl":
        log.write(path, stored)
    else:
        from moescope.route_files import columns  # noqa: PLC0415 - the light base has no pyarrow

        columns.write(path, stored, long=long, missing=missing)


def read(
    path: Path,
    known: Mapping[str, Known] | None = None,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    folder: Path | None = None,
    where: Filter = EVERY,
) -> tuple[Server, Iterator[Kept]]:
    """Return what a file says of its server, and its traces one after the other.

    Args:
        path: The file.
        known: What is known of the requests of a route log, by their id.
        num_experts: Routed experts a layer, for a route log that does not say it.
        top_k: Experts a token and layer, for a route log that does not say it.
        folder: Where the rows of a route log lie meanwhile; its own directory where None.
        where: Which traces, of a file of an archive.

    Raises:
        CommandError: pyarrow is missing.
        Exception: It is no such file; what it is depends on where it is broken.
    """
    if path.suffix == ".npz":
        return npz.read(path)
    if path.suffix == ".jsonl":
        return log.read(path, known or {}, num_experts=num_experts, top_k=top_k, folder=folder)
    check(path.suffix.removeprefix("."))
    from moescope.route_files import columns  # noqa: PLC0415

    return columns.read(path, where)


def counted(
    path: Path, num_experts: int | None = None, top_k: int | None = None
) -> routes_log.LoggedRoutes:
    """Count the selections in a file of any format, as `moescope.routes_log.read` does of a log.

    Raises:
        CommandError: pyarrow is missing.
        FormatError: It is no such file; the message names it.
    """
    with named(path):
        if path.suffix == ".jsonl":
            return routes_log.read(path, num_experts, top_k)
        return _counted(path)


def _counted(path: Path) -> routes_log.LoggedRoutes:
    server, traces = read(path)
    first, counts = None, np.zeros((0, 0), np.int64)
    sequences = rows = missing = 0
    for kept in traces:
        trace = kept.trace
        first = first or trace.page(trace.start, 0)
        counts = trace.counts() + (counts if sequences else 0)
        sequences += 1
        rows += trace.num_rows
        missing += int((~trace.present).sum())
    versions = first.versions if first else {}
    return routes_log.LoggedRoutes(
        meta={
            "model_id": first.model if first else None,
            "vllm_version": versions.get("vllm"),
            "torch_version": versions.get("torch"),
            "device": server.get("device"),
            "seed": server.get("seed"),
            "layers_logged": first.layers.tolist() if first else [],
            "top_k": first.top_k if first else 0,
            "num_experts": first.num_experts if first else 0,
        },
        layers=first.layers.tolist() if first else [],
        counts=counts,
        sequences=sequences,
        rows=rows,
        missing_rows=missing,
        torn_lines=0,
    )
