"""Errors that moescope's client raises.

.. code-block:: text

    MoescopeError
    ├── LayerNotCapturedError (ValueError)   a layer the model or the trace does not have
    ├── FormatError (ValueError)             bytes or text that are no trace
    ├── DatasetError (ValueError)            a data set that cannot be read
    ├── CommandError                         a command cannot do its work
    ├── ConnectionFailedError                no answer from the server
    └── ServerError                          the server answered with an error
        ├── AuthenticationError              401: no key, or a wrong one
        ├── RequestNotFoundError             404: the server never saw this id
        ├── StillRunningError                202: the request has not finished
        ├── TraceEvictedError                410: the trace made room for newer ones
        ├── InvalidQueryError                422: a parameter the server cannot take
        └── CollectorDownError               503: the collector process does not answer
"""

from __future__ import annotations

from collections.abc import Iterable


class MoescopeError(Exception):
    """Base of every error that moescope raises."""


class LayerNotCapturedError(MoescopeError, ValueError):
    """A layer was asked for that was not captured."""

    def __init__(self, unknown: Iterable[int], captured: Iterable[int]) -> None:
        wanted = ", ".join(map(str, unknown))
        have = ", ".join(map(str, captured))
        super().__init__(f"layer {wanted} is not captured; captured layers: {have}")


class FormatError(MoescopeError, ValueError):
    """Bytes or text do not hold traces in the expected format."""


class DatasetError(MoescopeError, ValueError):
    """A data set is missing or malformed."""


class CommandError(MoescopeError):
    """A command cannot do its work; the message says why and what to do."""


class ConnectionFailedError(MoescopeError):
    """The server did not answer."""


class ServerError(MoescopeError):
    """The server answered with an error.

    Attributes:
        status_code: The HTTP status.
    """

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code


class AuthenticationError(ServerError):
    """The server wants an API key that was not given, or another one."""


class RequestNotFoundError(ServerError):
    """The server never saw this request id, or was told to forget it."""


class StillRunningError(ServerError):
    """The request has not finished."""


class TraceEvictedError(ServerError):
    """The trace was evicted from the server's bounded store."""


class InvalidQueryError(ServerError):
    """The server cannot take a parameter of the query."""


class CollectorDownError(ServerError):
    """The server's collector process does not answer."""
