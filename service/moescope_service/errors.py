"""Errors of the service."""

from __future__ import annotations


class RefusedError(RuntimeError):
    """moescope cannot capture with this vLLM, model or configuration, and so does not start.

    Raised before the server accepts requests, since wrong data would not be noticed later. The
    message says the reason and what to do.
    """


class CollectorGoneError(RuntimeError):
    """The collector process does not answer."""
