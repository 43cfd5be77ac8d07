"""Where the files of an archive are, and what their names say.

``date=2026-11-30/hour=10/part-COLLECTOR-FIRST-LAST.parquet``: the hour, in UTC, in which the traces
ended, the collector that made them, and their first and last number. A collector numbers its traces
in the order in which they end, so that the names alone say which of them are there.

An archive of several servers has a directory of each: ``server=NAME/date=2026-11-30/…``. Each
server writes its own and knows of no other; readers find the files of all.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from typing import Self

HOUR_S = 3600
_PATH = re.compile(
    r"(?:server=([^/]+)/)?date=(\d{4}-\d{2}-\d{2})/hour=(\d{2})/part-([0-9a-f]+)-(\d+)-(\d+)\.parquet"
)


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Part:
    """A file of an archive; the order is that in which one server's traces ended."""

    hour: int
    """Hours since 1970 in UTC."""
    collector: str
    """The collector that made the traces, as hexadecimal digits: when it started, in milliseconds
    since 1970 (12 digits), and 8 random ones."""
    first: int
    last: int
    server: str = ""
    """The server that has a directory of its own in the archive; empty: the archive is one
    server's."""

    @classmethod
    def parse(cls, path: str) -> Self | None:
        """Return what a path in an archive names; None where that is no file of it."""
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        server, date, hour, collector, first, last = match.groups()
        try:
            begin = dt.datetime.fromisoformat(f"{date}T{hour}:00:00+00:00")
        except ValueError:
            return None
        return cls(int(begin.timestamp()) // HOUR_S, collector, int(first), int(last), server or "")

    @property
    def path(self) -> str:
        """Its path in the archive."""
        begin = dt.datetime.fromtimestamp(self.hour * HOUR_S, dt.UTC)
        name = f"part-{self.collector}-{self.first:09d}-{self.last:09d}.parquet"
        folder = f"server={self.server}/" if self.server else ""
        return f"{folder}date={begin:%Y-%m-%d}/hour={begin:%H}/{name}"

    def overlaps(self, since_s: float | None, until_s: float | None) -> bool:
        """Whether its hour has a part of a span of Unix time, in seconds; None: no bound."""
        begin_s = self.hour * HOUR_S
        return (since_s is None or begin_s + HOUR_S > since_s) and (
            until_s is None or begin_s < until_s
        )
