"""The collector's tcp address: lets in who has the nodes' key, and counts who is refused."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from moescope_service.addresses import DOMAIN, Address
from moescope_service.limited_logger import LimitedLogger
from moescope_service.settings import flag

logger = logging.getLogger("moescope.collector")

_LOG_INTERVAL_S = 60.0
_REFUSED = (
    zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)


@contextlib.contextmanager
def listening(
    context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], address: Address | None
) -> Iterator[Callable[[], int]]:
    """Let other nodes connect while the block runs.

    Args:
        context: The socket's.
        socket: The collector's ROUTER, bound to its other addresses by now.
        address: For other nodes, with their key; None: there are none.

    Yields:
        What returns how many connections were refused since its last call, and logs one a minute
        at most: without a key, with another one, or by another protocol.
    """
    if address is None or address.key is None:
        yield lambda: 0
        return
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(DOMAIN, _Provider(address.key.public))
    try:
        with socket.get_monitor_socket(_REFUSED) as monitor:
            address.bind(socket)
            if address.is_loopback:
                logger.warning(
                    "%s is reached from this machine alone: does its hosts file give its own name "
                    "such an address? Name another one by %s", address.url, flag("bind"),
                )  # fmt: skip
            limited_logger = LimitedLogger(logger, _LOG_INTERVAL_S)
            take_refused = functools.partial(_take_refused, monitor, address.url, limited_logger)
            yield take_refused
            take_refused()  # with 2,000 that wait ZMQ's thread holds the lock that comes next
            socket.disable_monitor()
    finally:
        authenticator.stop()


class _Provider:
    """Says which peers' keys are known; called in the authenticator's thread."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


def _take_refused(monitor: zmq.Socket[bytes], url: str, limited_logger: LimitedLogger) -> int:
    num_refused = 0
    while monitor.poll(0):
        recv_monitor_message(monitor)
        num_refused += 1
        limited_logger.warning(
            "refused a connection to %s: it has another key than this node, or none; every node "
            "needs a copy of the first one's key file",
            url,
        )
    limited_logger.tick()
    return num_refused
