"""Which files of an archive have traces that are wanted, and what there is where none has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moescope import route_files
from moescope.columns_file import columns_file, require
from moescope.errors import CommandError
from moescope.filters import OPTIONS, Filter, moment
from moescope.received import shown
from moescope.route_files import named

_NUM_ROWS = 2**17


def chosen(argument: str, paths: Sequence[Path], where: Filter) -> list[Path]:
    """Return the files whose hours do not rule out what is wanted, of which one has it.

    Args:
        argument: What named them, for messages.
        paths: The files.
        where: Which traces; it wants something.

    Raises:
        CommandError: One is no file of an archive, none has what is wanted, or pyarrow is missing.
        FormatError: One is broken; the message names it.
    """
    kept = [path for path in paths if _overlaps(path, where)]
    if not any(_has(path, where) for path in kept):
        raise CommandError(f"{argument} has no trace {where}; it has {_there(paths)}")
    return kept


def _overlaps(path: Path, where: Filter) -> bool:
    """Return whether a file may have what is wanted, by its name where that says its hour.

    Raises:
        CommandError: It is no file of an archive, or pyarrow is missing.
    """
    if path.suffix == ".parquet":
        require()
        from moescope.archive.layout import Part  # noqa: PLC0415 - needs pyarrow

        part = Part.parse("/".join(path.absolute().parts[-3:]))
        if part is not None:
            return part.overlaps(where.since_s, where.until_s)
        with named(path), columns_file(path) as file:
            if "archive" in file.shared:
                return True
    raise CommandError(f"{path} is no file of an archive: {OPTIONS} choose from archives alone")


def _has(path: Path, where: Filter) -> bool:
    with named(path):
        _, traces = route_files.read(path, where=where)
        return next(traces, None) is not None


def _there(paths: Sequence[Path]) -> str:
    """Return in words which models, adapters and times there are."""
    models, adapters, times = set[str](), set[str](), set[np.datetime64]()
    for path in paths:
        with named(path), columns_file(path) as file:
            for batch in file.batches(_NUM_ROWS, ["model", "lora", "finished_s"]):
                models |= _names(batch["model"])
                adapters |= _names(batch["lora"])
                times |= _ends(batch["finished_s"])
    if not times:
        return "none at all"
    return (
        f"models: {_listed(models)}; adapters: {_listed(adapters)}; finished: "
        f"{min(times)}Z to {max(times)}Z"
    )


def _names(column: Any) -> set[str]:  # noqa: ANN401
    return {repr(name) if name else "none" for name in column.unique().to_pylist()}


def _listed(names: set[str]) -> str:
    return shown(", ".join(sorted(names)))


def _ends(column: Any) -> set[np.datetime64]:  # noqa: ANN401
    """Return the first and the last of times."""
    import pyarrow.compute as pc  # noqa: PLC0415 - the light base has no pyarrow

    ends = pc.min_max(column).as_py().values()
    return {moment(time_s) for time_s in ends if time_s is not None}
