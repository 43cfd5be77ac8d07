"""The body of ``/routes/{request_id}`` in every format."""

from __future__ import annotations

import dataclasses
import itertools
import time
from types import ModuleType
from typing import Any, Literal, NamedTuple

from fastapi import HTTPException

from moescope import formats
from moescope.errors import FormatError
from moescope.trace import RouteTrace
from moescope_service.messages import CaptureSpec
from moescope_service.queries import MAX_REPLY_BYTES

Format = Literal["json", "jsonl", "npz", "npy", "arrow", "parquet"]


PAGE_BYTES: dict[Format, int] = {
    "json": 4 * 2**20,
    "jsonl": 2 * 2**20,
    "npz": MAX_REPLY_BYTES,
    "npy": MAX_REPLY_BYTES,
    "arrow": MAX_REPLY_BYTES,
    "parquet": MAX_REPLY_BYTES,
}
"""Bytes of rows in a response at most, as the collector has them: a page of JSON is about 16 MB,
one of JSON Lines 24 MB."""
_MAKING_BYTES: dict[Format, int] = {"json": 14, "jsonl": 28, "npy": 6, "arrow": 5, "parquet": 5}
"""Text is up to six times as long as what the collector has, JSON Lines twelve times, int32 four
times; while it is put together, it is there twice."""
TEXT_BYTES = 8 * 2**20
"""Bytes of tokens' text in a response at most, as JSON, beside its rows."""
_MAKING_TEXT_BYTES = 5
"""The text is there twice while it is put together, and a list has 8 bytes for each ``"",``."""
_LINES_AT_ONCE = 64


def making_bytes(form: Format, *, tokens: bool = False) -> int:
    """Return what making a page takes at most, with the text of tokens or without, in bytes."""
    text_bytes = _MAKING_TEXT_BYTES * TEXT_BYTES if tokens else 0
    return PAGE_BYTES[form] * _MAKING_BYTES.get(form, 3) + text_bytes


def require_arrow() -> ModuleType:
    """Return `moescope.arrow`.

    Raises:
        HTTPException: 501, pyarrow is not installed.
    """
    try:
        from moescope import arrow
    except ImportError as error:
        raise HTTPException(501, str(error)) from None
    return arrow


class NpyOptions(NamedTuple):
    """As of `moescope.formats.dump_npy`."""

    dtype: Literal["int16", "int32"] | None = None
    fill: Literal[-1] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Rows of the traces of one request, as a response has them."""

    request_id: str
    """The id that was asked for."""
    traces: list[RouteTrace]
    """At least one."""
    spec: CaptureSpec
    """What the worker captures; ``jsonl`` alone needs it."""
    truncated: bool
    """Whether older requests of that id are left out."""
    next_start: int | None
    """The first row that is left out; None where none is."""
    npy: NpyOptions

    @property
    def _marks(self) -> dict[str, Any]:
        return {"truncated": self.truncated, "next_start": self.next_start}

    def write(self, form: Format) -> bytes:
        """Return the page in a format.

        Raises:
            HTTPException: The format cannot hold these traces, or needs pyarrow.
        """
        match form:
            case "json":
                return formats.dump_json(self.request_id, self.traces, **self._marks)
            case "jsonl":
                return self._jsonl()
            case "npz":
                return formats.dump_npz(self.traces, **self._marks)
            case "npy":
                return self._npy()
            case "arrow" | "parquet":
                return self._columnar(form)

    def _npy(self) -> bytes:
        if len(self.traces) > 1 or (self.truncated and self.next_start is None):
            indices = [trace.index for trace in self.traces]
            raise HTTPException(
                422,
                f"index: npy holds one sequence and {self.request_id!r} has {indices}"
                f"{' and older ones' if self.truncated else ''}; name one with index, and use the "
                "id of a response where an index repeats",
            )
        try:
            return formats.dump_npy(self.traces[0], **self.npy._asdict())
        except FormatError as error:
            raise HTTPException(409, str(error)) from None

    def _columnar(self, form: Literal["arrow", "parquet"]) -> bytes:
        arrow = require_arrow()
        dump = arrow.dump_arrow if form == "arrow" else arrow.dump_parquet
        content: bytes = dump(self.traces, **self._marks)
        return content

    def _jsonl(self) -> bytes:
        meta = formats.meta_line(
            model=self.spec.model,
            versions=self.spec.versions,
            device=self.spec.device,
            seed=self.spec.seed,
            layers=self.traces[0].layers.tolist(),
            top_k=self.spec.top_k,
            num_experts=self.spec.num_experts,
            **self._marks,
        )
        lines = (line for trace in self.traces for line in formats.route_lines(trace))
        pieces = [meta]
        while some := b"".join(itertools.islice(lines, _LINES_AT_ONCE)):
            pieces.append(some)
            time.sleep(0)  # lets waiting threads run now, not after the switch interval of 5 ms
        return b"".join(pieces)
