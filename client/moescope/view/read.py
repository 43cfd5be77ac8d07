"""Reads the inputs of ``moescope view`` into traces."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from moescope import formats
from moescope.analyze import read_log
from moescope.analyze.batches import Model
from moescope.analyze.inputs import Input
from moescope.errors import CommandError, FormatError, MoescopeError
from moescope.received import MALFORMED, MAX_BYTES, shown
from moescope.trace import RouteTrace
from moescope.view import log
from moescope.view.shown import Selection, Shown


def read(
    found: Sequence[Input],
    selection: Selection,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
) -> None:
    """Read inputs, one after the other.

    Args:
        found: The inputs.
        selection: Where their requests go.
        num_experts: Routed experts a layer, for a route log that does not say it.
        top_k: Experts a token and layer, for a route log that does not say it.

    Raises:
        CommandError: They are of several models, have too much, or nothing to show.
        FormatError: A file is broken.
    """
    for one in found:
        try:
            if one.path.suffix == ".jsonl":
                known = read_log.known_of(one.run_dir) if one.run_dir else {}
                log.read(one.path, selection, known, num_experts, top_k)
            else:
                _add(one.path, _traces(one.path), selection)
        except MoescopeError as error:
            named = str(error) if str(one.path) in str(error) else f"{one.path}: {error}"
            raise type(error)(named) from error
        except (*MALFORMED, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise FormatError(f"{one.path}: no file of routes: {shown(error)}") from error
    if not any(one.trace.present.any() for one in selection.traces):
        raise CommandError("the inputs have no routed token: there is nothing to show")


def _traces(path: Path) -> list[RouteTrace]:
    _check_bytes(path.stat().st_size)
    if path.suffix == ".npz":
        return formats.load_npz(path.read_bytes())
    try:
        from pyarrow import parquet  # noqa: PLC0415 - the light base has no pyarrow

        from moescope import arrow  # noqa: PLC0415
    except ImportError as error:
        raise CommandError(
            "reading Parquet needs pyarrow, moescope's extra `arrow`: pip install pyarrow"
        ) from error
    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(at) for at in range(file.metadata.num_row_groups)]
        columns = [one.column(at) for one in groups for at in range(one.num_columns)]
        # Few bytes may stand for many equal values.
        _check_bytes(sum(max(one.total_uncompressed_size, 4 * one.num_values) for one in columns))
        return arrow.from_table(file.read())


def _check_bytes(size: int) -> None:
    if size > MAX_BYTES:
        raise CommandError(
            f"its traces have {size:,} bytes, and view reads {MAX_BYTES:,} of a file at most: "
            "give it files of fewer requests"
        )


def _add(path: Path, traces: Iterable[RouteTrace], selection: Selection) -> None:
    for trace in traces:
        model = Model(
            layers=tuple(trace.layers.tolist()),
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            name=trace.model,
        )
        selection.enter(path, model)
        if trace.start or trace.num_rows < trace.num_tokens - 1:
            raise CommandError(
                f"it holds {trace.num_rows:,} rows of {trace.request_id}, from row {trace.start} "
                f"on, and that has {trace.num_tokens - 1:,}: view shows whole requests; fetch it "
                "without start and limit"
            )
        if selection.wants(trace.request_id):
            selection.add(Shown(trace=trace, tokens=trace.tokens))
