"""Where the collector is bound: a socket file on its own node, tcp for the processes of others.

Over tcp everything is encrypted and both sides are authenticated, by CURVE and the key of
`moescope_service.node_key`. Heartbeats find a link that breaks without a word.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import socket as sockets

import zmq

from moescope_service.errors import RefusedError
from moescope_service.node_key import NodeKey, read_key
from moescope_service.parsers import HostPort
from moescope_service.settings import Settings, flag

DOMAIN = "moescope"
"""Of those whose key is asked for (ZMQ RFC 27, ZAP)."""
MAX_FRAME_BYTES = 64 * 2**20
"""Largest frame that the collector takes over tcp; rows come in messages of 1 MiB."""
HEARTBEAT_MS = 2000
HEARTBEAT_TIMEOUT_MS = 10_000
"""A link on which nothing arrives for that long is broken."""
_CONNECT_TIMEOUT_MS = 5000
_MAX_RECONNECT_MS = 2000


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """An address of the collector."""

    url: str
    """``ipc://PATH`` or ``tcp://HOST:PORT``."""
    key: NodeKey | None = None
    """Of tcp, the key of the nodes."""

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this machine reach it."""
        host = self.url.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        return self.key is None or ipaddress.ip_address(host).is_loopback

    def connect(self, socket: zmq.Socket[bytes]) -> None:
        """Connect a socket of a worker or an API server; ZMQ connects again where that breaks."""
        if self.key is not None:
            _set_up(socket, self.key)
            socket.setsockopt(zmq.CURVE_SERVERKEY, self.key.public)
            socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_TIMEOUT_MS)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
        socket.connect(self.url)

    def bind(self, socket: zmq.Socket[bytes]) -> None:
        """Bind the collector's socket, to this address beside others.

        What is set here holds for this address alone: ZMQ's options hold for what is bound after
        them (zmq_setsockopt(3)). So bind those without a key first.
        """
        if self.key is not None:
            _set_up(socket, self.key)
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())
            # Else who has any key is let in while nobody looks at keys (zmq_setsockopt(3)).
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.bind(self.url)


def _set_up(socket: zmq.Socket[bytes], key: NodeKey) -> None:
    socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def node_address(settings: Settings) -> Address | None:
    """Return the address of the collector for other nodes; None where it has none.

    Raises:
        RefusedError: The key cannot be read, or the host's name has no address.
    """
    if settings.bind is None or settings.key_file is None:
        return None
    key = read_key(settings.key_file)
    return Address(f"tcp://{_numeric(settings.bind)}", key)


def _numeric(bind: HostPort) -> str:
    """Return ``HOST:PORT`` with the host's number: ZMQ binds to no name."""
    try:
        found = sockets.getaddrinfo(bind.host, bind.port, type=sockets.SOCK_STREAM)
    except OSError as error:
        raise RefusedError(f"{flag('bind')} {bind}: {bind.host}: {error.strerror}") from None
    family, *_, where = found[0]
    host = f"[{where[0]}]" if family == sockets.AF_INET6 else where[0]
    return f"{host}:{bind.port}"
