"""Keeps the pages of other sites away from moescope's endpoints.

A browser sends requests of any page to any address, cookies or not, and its user's machine may
reach a server that the page's site does not. A form needs no CORS preflight, and where a page's own
name is made to lead here (DNS rebinding) the answer is not even another origin's. Browsers say so
in headers that pages cannot set; programs send none of these, and are not asked.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers

from moescope_service.parsers import shown
from moescope_service.settings import flag

_OWN = frozenset({"same-origin", "none"})
"""``Sec-Fetch-Site`` of our own pages, and of an address that a user typed in."""
_PORTS = {"http": ":80", "https": ":443"}


class Browsers:
    """Says which requests of browsers are let in.

    Args:
        allowed_origins: As of `moescope_service.vllm_contract.compat`; ``*`` is all.
        allowed_hosts: Names of this server, beside the machine's own, in small letters.
        checks_host: Whether a request has to name this server. Without API keys, whatever a page
            under a name of its own can send here is let in.
    """

    def __init__(
        self, allowed_origins: Iterable[str], allowed_hosts: Iterable[str], *, checks_host: bool
    ) -> None:
        self._origins = frozenset(allowed_origins)
        self._hosts = frozenset({socket.gethostname().lower(), *allowed_hosts})
        self._checks_host = checks_host

    def check(self, headers: Headers) -> None:
        """Let a request in that no page of another site sent.

        Raises:
            HTTPException: 403, one did, or may have.
        """
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site is None and origin is None:
            return
        host = headers.get("host", "")
        if origin is None:
            if site not in _OWN:
                raise HTTPException(
                    403,
                    f"another site's page sent this (Sec-Fetch-Site: {shown(site or '')}): open "
                    "the address itself",
                )
        elif not self._allows(origin) and (not _is_same(origin, host) or site not in {None, *_OWN}):
            raise HTTPException(
                403,
                f"another site's page sent this: its Origin {shown(origin)} is not the Host "
                f"{shown(host)}; name it in vLLM's --allowed-origins to let it in",
            )
        if self._checks_host and not self._is_known(_name(host)):
            raise HTTPException(
                403,
                f"the Host {shown(host)} may be another site's, and this server has no API keys: "
                f"use its IP address or its machine's name, or name it in {flag('allowed_hosts')}",
            )

    def _allows(self, origin: str) -> bool:
        return "*" in self._origins or origin in self._origins

    def _is_known(self, name: str) -> bool:
        """Return whether a name cannot be one that somebody else's DNS leads here."""
        return name != "" and ("." not in name or name in self._hosts or _is_address(name))


def _is_same(origin: str, host: str) -> bool:
    """Return whether an origin is the host's; a proxy may have taken its ``https`` away."""
    try:
        parts = urlsplit(origin.lower())
    except ValueError:  # a bracket without its other one
        return False
    port = _PORTS.get(parts.scheme, "")
    return parts.netloc != "" and parts.netloc.removesuffix(port) == host.lower().removesuffix(port)


def _name(host: str) -> str:
    """Return the name or address of a ``Host`` header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
