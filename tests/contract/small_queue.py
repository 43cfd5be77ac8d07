"""A collector whose queue for the archive holds few traces: under some load it counts losses."""

from __future__ import annotations

import functools

from moescope_service.collector import process
from moescope_service.collector.archive_queue import ArchiveQueue

MAX_WAITING_BYTES = 100_000
"""Some forty traces."""

if __name__ == "__main__":
    process.ArchiveQueue = functools.partial(  # type: ignore[assignment, misc]
        ArchiveQueue, max_waiting_bytes=MAX_WAITING_BYTES
    )
    process.main()
