"""Messages between the collector and the archive's process.

The collector numbers what it hands over. It begins a connection with ``archive`` and goes on with
``traces``, ``forget`` and ``alias``; it is told ``archived`` for all up to a number, ``lost`` for
those that cannot be taken in, and ``figures``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from moescope import formats
from moescope.trace import RouteTrace
from moescope_service.messages import CaptureSpec, Frames, pack
from moescope_service.queries import ArchiveFigures, ArrayHead


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """A trace on its way to the archive, without its rows."""

    number: int
    finished_s: float
    ids: tuple[str, ...]
    owner: str | None


def pack_traces(
    spec: CaptureSpec, handed: Sequence[Handed], traces: Sequence[RouteTrace]
) -> list[Any]:
    """Return the frames of traces.

    Args:
        spec: What the deployment captures.
        handed: What is said of each trace.
        traces: Whole traces.

    Raises:
        FormatError: Their layers or top-k differ.
    """
    arrays = {name: np.ascontiguousarray(a) for name, a in formats.arrays_of(traces).items()}
    heads = [ArrayHead(name=n, dtype=a.dtype.str, shape=a.shape) for n, a in arrays.items()]
    return pack("traces", list(arrays.values()), spec=spec, handed=handed, heads=heads)


def unpack_traces(
    values: dict[str, Any], frames: Frames
) -> tuple[CaptureSpec, list[Handed], list[RouteTrace]]:
    """Return what `pack_traces` took; the arrays are views of the frames.

    Raises:
        ValueError: It is no such message.
    """
    heads = msgspec.convert(values["heads"], list[ArrayHead])
    members = {
        head.name: np.frombuffer(frame, head.dtype).reshape(head.shape)
        for head, frame in zip(heads, frames[1:], strict=True)
    }
    spec = msgspec.convert(values["spec"], CaptureSpec)
    return spec, msgspec.convert(values["handed"], list[Handed]), formats.traces_of(members)


def figures_of(values: dict[str, Any]) -> ArchiveFigures:
    """Return what a ``figures`` message says."""
    return msgspec.convert(values["figures"], ArchiveFigures)
