"""Why rows are lost on their way, and why traces lack rows: the names that people see."""

from __future__ import annotations

LOST_CAUSES = ("queue_full", "paused", "hook_missed")
"""Why a worker ships no rows of a step: its queue is full, the capture is paused, or a layer did
not hand over the rows of this step."""

MISSING_CAUSES = (
    "not_captured",
    *LOST_CAUSES,
    "overwritten",
    "not_routed",
    "unknown",
    "restart",
    "link_broken",
)
"""Why a row of a trace is missing: no worker ever shipped it (it came through a KV connector, or
with steps that were lost altogether), one of `LOST_CAUSES`, its block went to another sequence, its
sequence was aborted before the token was routed, its worker never reported the sequence's end, it
was routed before this collector was started in the place of another, or before its worker came
again, whose link to the collector was broken."""

ARCHIVE_CAUSES = ("away", "failing", "behind", "unwritable")
"""Why the archive lacks a trace: the queue was full since no process of the archive ran, since it
could not write its files, or since it wrote too slowly; or the trace itself cannot be written."""
