"""Traces that were handed over and are not published yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from moescope.archive.layout import HOUR_S, Part
from moescope.archive.table import Archived
from moescope_service.messages import CaptureSpec

OVERHEAD_BYTES = 2048


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """A trace, and who handed it over."""

    entry: Archived
    collector: str
    spec: CaptureSpec

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds."""
        return self.entry.trace.size_bytes + OVERHEAD_BYTES

    @property
    def hour(self) -> int:
        """The hour in which it was finished, as of `Part`."""
        return int(self.entry.finished_s // HOUR_S)

    def belongs(self, part: Part) -> bool:
        """Whether it is one of those of a file."""
        return self.collector == part.collector and part.first <= self.entry.number <= part.last

    def finds(self, request_id: str, owner: str | None) -> tuple[bool, bool]:
        """Return whether an id of an owner (None: of anyone) is that of its response, or any."""
        is_owned = owner in {None, self.entry.owner}
        is_own = is_owned and request_id == self.entry.trace.request_id
        return is_own, is_own or (is_owned and request_id in self.entry.ids)


def matching(
    pending: Iterable[Pending], request_id: str, owner: str | None
) -> tuple[list[Pending], list[Pending]]:
    """Return those whose response has an id, and all that it finds."""
    told = [(one, *one.finds(request_id, owner)) for one in pending]
    return [one for one, own, _ in told if own], [one for one, _, found in told if found]


def groups(pending: Iterable[Pending], apart: Part | None = None) -> list[list[Pending]]:
    """Return what goes into a file each: of one collector, one hour and one model, in order.

    Args:
        pending: All of it.
        apart: A file whose traces go with no others.
    """

    def file_of(one: Pending) -> tuple[object, ...]:
        is_apart = apart is not None and one.belongs(apart)
        return one.collector, one.hour, is_apart, one.spec

    found: list[list[Pending]] = []
    for one in sorted(pending, key=lambda one: (one.collector, one.entry.number)):
        if found and file_of(found[-1][-1]) == file_of(one):
            found[-1].append(one)
        else:
            found.append([one])
    return found


def part_of(group: list[Pending]) -> Part:
    """Return the file of a group."""
    first, last = group[0], group[-1]
    return Part(first.hour, first.collector, first.entry.number, last.entry.number)
