"""Errors that moescope's client raises.

.. code-block:: text

    MoescopeError
    ├── LayerNotCapturedError (ValueError)   a layer the model or the trace does not have
    ├── FormatError (ValueError)             bytes or text that hold no trace
    │   └── ResponseTooLargeError            a response of more than `max_bytes`
    ├── DatasetError (ValueError)            a data set that cannot be read
    ├── CommandError                         a command cannot do its work
    │   └── StoppedError                     a signal ended it early
    ├── ConnectionFailedError                no response from the server
    └── ServerError                          the server responded with an error
        ├── AuthenticationError              401: no key, or a wrong one
        ├── PermissionDeniedError            403: this key or page may not do this
        ├── RequestNotFoundError             404: the server never saw this id
        ├── StillRunningError                202: the request has not finished
        ├── TraceEvictedError                410: the trace made room for newer ones
        ├── InvalidQueryError                422: a parameter the server cannot take
        └── CollectorDownError               503: the collector process does not respond
"""

from __future__ import annotations

import signal
from collections.abc import Iterable


class MoescopeError(Exception):
    """Base of every error that moescope raises."""


class LayerNotCapturedError(MoescopeError, ValueError):
    """A requested layer was not captured."""

    def __init__(self, unknown: Iterable[int], captured: Iterable[int]) -> None:
        wanted = ", ".join(map(str, unknown))
        have = ", ".join(map(str, captured))
        super().__init__(f"layer {wanted} is not captured; captured layers: {have}")


class FormatError(MoescopeError, ValueError):
    """Bytes or text do not hold traces in the expected format."""


class ResponseTooLargeError(FormatError):
    """A response has more bytes than ``max_bytes``, as sent or once decompressed."""


class DatasetError(MoescopeError, ValueError):
    """A data set is missing or malformed."""


class CommandError(MoescopeError):
    """A command cannot do its work; the message says why and what to do."""


class StoppedError(CommandError):
    """A signal ended a command early; the message says what was done until then.

    Args:
        message: What was done.
        number: The signal; that of Ctrl-C by default.

    Attributes:
        exit_status: What the command exits with: 128 and the signal's number, as in shells.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


class ConnectionFailedError(MoescopeError):
    """The server did not respond.

    Attributes:
        is_transient: Whether it may respond later: the network or the server failed, not the
            address or a certificate.
    """

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.is_transient = is_transient


class ServerError(MoescopeError):
    """The server responded with an error.

    Attributes:
        status_code: The HTTP status.
        retry_after_s: Seconds after which the server asks to come back; None where it says nothing.
    """

    def __init__(self, message: str, status_code: int, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.retry_after_s = retry_after_s


class AuthenticationError(ServerError):
    """The API key is missing or wrong."""


class PermissionDeniedError(ServerError):
    """The key may not do this, or the server does not know the host that was asked for."""


class RequestNotFoundError(ServerError):
    """The server never saw this request id, or has deleted it."""


class StillRunningError(ServerError):
    """The request has not finished."""


class TraceEvictedError(ServerError):
    """The trace was evicted from the server's bounded store, or its registration was lost."""


class InvalidQueryError(ServerError):
    """The server cannot take a parameter of the query."""


class CollectorDownError(ServerError):
    """The server's collector process does not respond."""
