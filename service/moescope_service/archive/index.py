"""Finds traces of a file by the ids that clients saw, in about 100 bytes of memory a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from moescope.archive.layout import HOUR_S, Part
from moescope.archive.table import firsts, shared_of
from moescope_service.ids import id_hash

Ints = npt.NDArray[np.int64]

_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
_COLUMNS = [
    "number",
    "request_id",
    "index",
    "num_tokens",
    "created_s",
    "finished_s",
    "owner",
    "ids",
]


def id_key(request_id: str, owner: str | None) -> int:
    """Return what finds an id: among all traces, or among those that an owner's key made.

    64 bits of BLAKE2b: nobody can choose an id that has another owner's key.
    """
    return id_hash(f"{owner or ''}\n{request_id}")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FileIndex:
    """What is known of a file. All arrays but the last two are ``[num_traces]``."""

    part: Part
    size_bytes: int
    oldest_s: float
    """Unix time at which its first trace was finished, in seconds."""
    number: Ints
    """The collector's number of each trace, ascending."""
    index: Ints
    """The choice's index in the response."""
    num_tokens: Ints
    """Tokens of each trace, and so rows of the file."""
    first_row: Ints
    """Of each trace."""
    created_s: npt.NDArray[np.float64]
    keys: npt.NDArray[np.uint64]
    """`id_key` of every id of every trace, ascending."""
    places: npt.NDArray[np.uint32]
    """Twice the place of each key's trace among the others, plus one for the response's id."""
    deleted: set[int] = dataclasses.field(default_factory=set)
    """Numbers of the traces that are still in the file and are not to be found."""

    @classmethod
    def of(cls, part: Part, size_bytes: int, table: pa.Table) -> FileIndex:
        """Return the index of a file.

        Args:
            part: Which one.
            size_bytes: Its size.
            table: Its rows; columns of routes need not be there.
        """
        bounds = firsts(table)
        heads = table.select(_COLUMNS).take(pa.array(bounds[:-1]))
        keys, places = _keys(heads.select(["request_id", "owner", "ids"]).to_pylist())
        order = np.argsort(keys, kind="stable")

        def ints(name: str) -> Ints:
            return heads[name].cast(pa.int64()).to_numpy()

        return cls(
            part=part,
            size_bytes=size_bytes,
            oldest_s=float(pc.min(heads["finished_s"]).as_py()),
            number=ints("number"),
            index=ints("index"),
            num_tokens=ints("num_tokens"),
            first_row=bounds[:-1],
            created_s=heads["created_s"].to_numpy(),
            keys=keys[order],
            places=places[order],
        )

    @classmethod
    def read(cls, part: Part, size_bytes: int, source: Any) -> FileIndex:
        """Return the index of a file that is there.

        Args:
            part: Which one.
            size_bytes: Its size.
            source: The opened file.

        Raises:
            FormatError: It is no file of an archive, or one of a later version.
            pyarrow.ArrowException: It is no file of an archive.
            OSError: It cannot be read.
        """
        table = parquet.read_table(source, columns=_COLUMNS)
        shared_of(table.schema)
        return cls.of(part, size_bytes, table)

    @classmethod
    def nothing(cls, part: Part, size_bytes: int) -> FileIndex:
        """Return the index of a file that cannot be read: its hour says how old it is."""
        ints = np.empty(0, np.int64)
        return cls(
            part=part,
            size_bytes=size_bytes,
            oldest_s=float(part.hour * HOUR_S),
            number=ints,
            index=ints,
            num_tokens=ints,
            first_row=ints,
            created_s=np.empty(0, np.float64),
            keys=np.empty(0, np.uint64),
            places=np.empty(0, np.uint32),
        )

    def find(self, key: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return the places of the traces that an id finds, and of which it is the response's."""
        wanted = np.uint64(key)
        first, last = (int(np.searchsorted(self.keys, wanted, side=side)) for side in _SIDES)
        places, is_own = np.divmod(self.places[first:last].astype(np.int64), 2)
        if self.deleted:
            stays = ~np.isin(self.number[places], [*self.deleted])
            places, is_own = places[stays], is_own[stays]
        return places, is_own.astype(np.bool_)


def _keys(
    heads: Sequence[dict[str, Any]],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
    keys, places = [], []
    for place, head in enumerate(heads):
        owners = {None, head["owner"]}
        for one in {*head["ids"], head["request_id"]}:
            keys += [id_key(one, owner) for owner in owners]
            places += [2 * place + (one == head["request_id"])] * len(owners)
    return np.array(keys, np.uint64), np.array(places, np.uint32)
