"""Parses the texts of settings and of query parameters.

Every parser raises ``ValueError`` with what it expects ("expected …"); its caller says of what.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from typing import NamedTuple

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)
MAX_SIZE = 2**62
"""Largest size: numbers in JSON and in indices of arrays have 64 bits."""

_HOST = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?")
_HOST_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
_IPV4_MAPPED = bytes(10) + b"\xff\xff"
_KEY = re.compile(r"[!-~]+")
_MAX_SHOWN_CHARS = 80


def parse_size(text: str) -> int:
    """Return bytes for ``1GiB``, ``512MB``, ``1000`` ….

    Raises:
        ValueError: The text is no size, less than 1, or more than `MAX_SIZE`.
    """
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0.0
    if size < 1:
        raise ValueError("expected bytes, or a size with a unit, such as 512MiB or 1GiB")
    if size > MAX_SIZE:
        raise ValueError(f"expected at most {MAX_SIZE:,} bytes")
    return int(size)


def parse_size_or_zero(text: str) -> int:
    """Return bytes as `parse_size` does, or 0.

    Raises:
        ValueError: The text is neither a size nor 0.
    """
    return 0 if text.strip() == "0" else parse_size(text)


def parse_on_off(text: str) -> bool:
    """Return whether the text is ``on``.

    Raises:
        ValueError: It is neither ``on`` nor ``off``.
    """
    return parse_choice("on", "off")(text) == "on"


def parse_hosts(text: str) -> frozenset[str]:
    """Return the host names of ``moe.example.org,box.lan``, in small letters.

    Raises:
        ValueError: A name is none.
    """
    names = {name.strip().lower().removesuffix(".") for name in text.split(",")}
    if not all(map(_HOST.fullmatch, names)):
        raise ValueError(
            "expected host names without scheme and port, such as moe.example.org,box.lan"
        )
    return frozenset(names)


class HostPort(NamedTuple):
    """A host's name or number, and a port of it."""

    host: str
    port: int

    @property
    def is_any(self) -> bool:
        """Whether it is every address of a machine, however written, and so names none."""
        try:
            number = socket.inet_aton(self.host)
        except OSError:
            try:
                number = socket.inet_pton(socket.AF_INET6, self.host).removeprefix(_IPV4_MAPPED)
            except OSError:
                return False
        return not any(number)

    def __str__(self) -> str:
        """Return ``HOST:PORT``, with brackets around a number of IPv6."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_host_port(text: str) -> HostPort:
    """Return host and port of ``10.0.0.1:5570``, ``head:5570`` or ``[fd00::1]:5570``.

    Raises:
        ValueError: The text is neither.
    """
    match = _HOST_PORT.fullmatch(text.strip())
    if match is None or not 0 < int(match[3]) < 2**16:
        raise ValueError("expected HOST:PORT, such as 10.0.0.1:5570 or [fd00::1]:5570")
    return HostPort(match[1] or match[2], int(match[3]))


def parse_key(text: str) -> str:
    """Return a key that an HTTP header can carry.

    Raises:
        ValueError: It is none; the message does not show it.
    """
    if not _KEY.fullmatch(text):
        raise ValueError("expected visible ASCII characters without spaces")
    return text


def parse_choice(*allowed: str) -> Callable[[str], str]:
    """Return a parser that takes nothing but the texts given."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text

    return parse


def parse_window(text: str) -> float:
    """Return the seconds of a window, above 0 and up to an hour.

    Raises:
        ValueError: The text is no such number.
    """
    seconds = _number(text)
    if not 0.0 < seconds <= 3600.0:
        raise ValueError("expected seconds, from above 0 to 3600")
    return seconds


def parse_age(text: str) -> float:
    """Return the seconds of an age, at least a minute.

    Raises:
        ValueError: The text is no such number.
    """
    seconds = _number(text)
    if not 60.0 <= seconds < float("inf"):
        raise ValueError("expected seconds, at least 60, such as 2592000 for 30 days")
    return seconds


def parse_share(text: str) -> float:
    """Return a share, from 0 to 1.

    Raises:
        ValueError: The text is no such number.
    """
    share = _number(text)
    if not 0.0 <= share <= 1.0:
        raise ValueError("expected a share from 0 to 1, such as 0.1")
    return share


def shown(text: str) -> str:
    """Return a received text as messages quote it: cut where it is long."""
    quoted = repr(text[: _MAX_SHOWN_CHARS + 1])
    return quoted if len(text) <= _MAX_SHOWN_CHARS else f"{quoted[:_MAX_SHOWN_CHARS]}…'"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
