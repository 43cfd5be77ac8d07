"""Errors of the service."""

from __future__ import annotations


class RefusedError(RuntimeError):
    """moescope will not capture here; the message says why and what to do.

    Raised before the server accepts requests: a clear refusal beats silent wrong data.
    """


class CollectorGoneError(RuntimeError):
    """The collector process does not answer."""
