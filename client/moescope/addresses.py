"""The address of a server: its base, whether it is this machine, how certificates are verified."""

from __future__ import annotations

import ipaddress
import os
import ssl
from pathlib import Path

import httpx

from moescope.errors import CommandError

Verify = bool | str | Path | ssl.SSLContext
"""How the certificate of an ``https`` server is verified: True by the authorities in the file
``SSL_CERT_FILE`` or the directory ``SSL_CERT_DIR``, or else in certifi's list; False not at all;
a path by the authorities in that PEM file or directory of OpenSSL's; or as a context says."""


def base_url(address: str) -> str:
    """Return the address that the paths of all endpoints follow, without ``/v1`` at its end.

    OpenAI's clients take addresses with ``/v1``.
    """
    return address.rstrip("/").removesuffix("/v1").rstrip("/")


def is_this_machine(url: httpx.URL) -> bool:
    """Return whether a URL leads to this machine."""
    try:
        address = ipaddress.ip_address(url.host)
    except ValueError:
        return url.host == "localhost"
    return address.is_loopback or address.is_unspecified


def tls_context(url: httpx.URL, verify: Verify = True) -> ssl.SSLContext:
    """Return the TLS context of connections to a server; where it wants none, one that trusts none.

    Raises:
        CommandError: The authorities' certificates cannot be read.
    """
    if isinstance(verify, ssl.SSLContext):
        return verify
    if url.scheme != "https":  # reading certificates takes tens of milliseconds
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if isinstance(verify, bool):
            return httpx.create_ssl_context(verify=verify)
        if Path(verify).is_dir():
            return ssl.create_default_context(capath=verify)
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        where = os.environ.get("SSL_CERT_FILE") if isinstance(verify, bool) else verify
        raise CommandError(
            f"cannot read certificates from {where}: {error.strerror or error}; expected a file "
            "of authorities in PEM, or a directory"
        ) from error
