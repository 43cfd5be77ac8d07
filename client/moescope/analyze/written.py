"""What is written of figures: the bytes of pictures, tables and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from matplotlib.figure import Figure

from moescope._style import DPI

_JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


def png(picture: Figure) -> bytes:
    """Return a picture as PNG."""
    buffer = io.BytesIO()
    picture.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> bytes:
    """Return a table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue().encode()


def json(values: Mapping[str, Any]) -> bytes:
    """Return values, numpy's arrays among them, as JSON; NaN is null."""
    return orjson.dumps(_plain(values), option=_JSON)


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return what orjson takes: contiguous arrays, and text without lone surrogates."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return value
