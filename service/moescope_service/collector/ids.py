"""Finds sequences and traces by the ids that clients saw, as fast among many as among few.

Where an id is that of a response, it finds what has that response and nothing else: a client
chooses its own ``X-Request-Id``, which may be the response id of another one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from sortedcontainers import SortedDict


class Identified(Protocol):
    """A sequence or a trace."""

    @property
    def uid(self) -> int:
        """The collector's own number of the sequence, growing with time."""

    @property
    def request_id(self) -> str:
        """The id in the response."""

    @property
    def owner(self) -> str | None:
        """As of `moescope_service.messages.Register`."""

    @property
    def ids(self) -> Collection[str]:
        """Every id that a client saw, that in the response included."""


T = TypeVar("T", bound=Identified)


class IdIndex(Generic[T]):
    """What ids find: of one owner, or of all (None)."""

    def __init__(self) -> None:
        # By (owner, id): by uid, in the order in which they were added.
        self._own: dict[tuple[str | None, str], dict[int, T]] = {}
        self._any: dict[tuple[str | None, str], dict[int, T]] = {}
        self._by_uid: dict[str | None, SortedDict[int, T]] = {None: SortedDict()}

    def __len__(self) -> int:
        return len(self._by_uid[None])

    def __iter__(self) -> Iterator[T]:
        return iter(self._by_uid[None].values())

    def __contains__(self, request_id: str) -> bool:
        return (None, request_id) in self._any

    def own(self, request_id: str, owner: str | None = None) -> dict[int, T]:
        """Return those whose response has an id, by uid; not to be changed."""
        return self._own.get((owner, request_id), {})

    def any(self, request_id: str, owner: str | None = None) -> dict[int, T]:
        """Return all that an id finds, by uid; not to be changed."""
        return self._any.get((owner, request_id), {})

    def get(self, uid: int) -> T | None:
        """Return one by its number."""
        found: T | None = self._by_uid[None].get(uid)
        return found

    def newest(self, before: int | None = None, owner: str | None = None) -> Iterator[T]:
        """Yield by falling uid, from below ``before`` on."""
        by_uid = self._by_uid.get(owner, SortedDict())
        for uid in by_uid.irange(maximum=before, inclusive=(True, False), reverse=True):
            yield by_uid[uid]

    def add(self, one: T) -> None:
        """Let its ids find one, in place of what has its number."""
        for owner in _owners(one):
            self._by_uid.setdefault(owner, SortedDict())[one.uid] = one
            self._own.setdefault((owner, one.request_id), {})[one.uid] = one
        self.add_ids(one, one.ids)

    def add_ids(self, one: T, ids: Iterable[str]) -> None:
        """Let more ids find one that is here."""
        for owner in _owners(one):
            for request_id in ids:
                self._any.setdefault((owner, request_id), {})[one.uid] = one

    def remove(self, one: T) -> None:
        """Let no id find one any more."""
        for owner in _owners(one):
            del self._by_uid[owner][one.uid]
            if owner is not None and not self._by_uid[owner]:
                del self._by_uid[owner]
            _discard(self._own, (owner, one.request_id), one.uid)
            for request_id in one.ids:
                _discard(self._any, (owner, request_id), one.uid)


def _owners(one: Identified) -> tuple[str | None, ...]:
    return (None,) if one.owner is None else (None, one.owner)


def _discard(
    index: dict[tuple[str | None, str], dict[int, T]], key: tuple[str | None, str], uid: int
) -> None:
    found = index[key]
    del found[uid]
    if not found:
        del index[key]
