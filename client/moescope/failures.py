"""httpx's errors about the connection, and moescope's in their place."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator

import httpx

from moescope.errors import ConnectionFailedError
from moescope.received import shown

_GONE = ("disconnected", "closed")
"""Words of httpx's protocol errors about a connection that ended too early."""
_UNKNOWN_AUTHORITY = {18, 19, 20, 21}
"""OpenSSL's codes of certificates that no known authority has signed (``X509_V_ERR_…``)."""
_CA_HINT = "; give its authority: --ca-cert (verify in Python) or SSL_CERT_FILE"


@contextlib.contextmanager
def transport_errors(base_url: str) -> Iterator[None]:
    """Turn httpx's errors about the connection into moescope's.

    Raises:
        ConnectionFailedError: In place of any of them.
    """
    try:
        yield
    except httpx.TimeoutException as error:
        raise ConnectionFailedError(
            f"no response from {base_url} in time ({type(error).__name__})", is_transient=True
        ) from error
    except (httpx.RequestError, httpx.StreamError, httpx.InvalidURL, UnicodeError) as error:
        refused = _refused_certificate(error)
        hint = _CA_HINT if refused and refused.verify_code in _UNKNOWN_AUTHORITY else ""
        is_network = isinstance(error, httpx.NetworkError) or ended_early(error)
        raise ConnectionFailedError(
            f"cannot reach {base_url}: {shown(str(error) or type(error).__name__)}{hint}",
            is_transient=is_network and not refused,
        ) from error


def ended_early(error: Exception) -> bool:
    """Return whether a connection ended within a response, or before it."""
    is_protocol = isinstance(error, httpx.RemoteProtocolError)
    return is_protocol and any(word in str(error) for word in _GONE)


def _refused_certificate(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """Return the error of a server's certificate that is behind an error of httpx, if one is."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__  # httpcore raises some "from None"
    return error
