"""The collector's process: a ZMQ ROUTER socket around `Collector`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import zmq

from moescope_service.collector.core import Collector
from moescope_service.link import SOCKET_QUEUE
from moescope_service.settings import Settings

logger = logging.getLogger("moescope.collector")

_TICK_MS = 20


def run(address: str, settings: Settings, parent: int, epoch: int) -> None:
    """Serve until SIGTERM, or until the process that started this one is gone.

    In the second case it removes the deployment's directory, which nobody else is left to do.

    Prints ``ready`` to standard output once the socket is bound. A message that cannot be
    understood, or what cannot be done when it is due, is logged and left out: serving goes on.

    Args:
        address: Where to bind, such as ``ipc:///run/…/collector.sock``.
        settings: What is kept, and how much.
        parent: Id of the process that started this one.
        epoch: How many collectors the deployment had before this one.
    """
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then stops us
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, SOCKET_QUEUE)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.bind(address)
        collector = Collector(settings, epoch=epoch)
        print("ready", flush=True)
        next_tick_s = 0.0
        while not stopped and os.getppid() == parent:
            if socket.poll(_TICK_MS):
                _receive(socket, collector)
            if time.monotonic() >= next_tick_s:
                _tick(collector)
                next_tick_s = time.monotonic() + _TICK_MS / 1000
            _send(socket, collector)
        while socket.poll(0):
            _receive(socket, collector)
        collector.close()
    if not stopped:
        _remove(Path(address.removeprefix("ipc://")))


def _remove(socket: Path) -> None:
    for left in (socket, socket.with_name("refused")):
        left.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's files are not ours to remove
        socket.parent.rmdir()


def _receive(socket: zmq.Socket[bytes], collector: Collector) -> None:
    peer, *frames = socket.recv_multipart(copy=False)
    try:
        collector.handle(peer.bytes, [frame.buffer for frame in frames])
    except Exception:
        logger.exception("left out a message of %s that cannot be understood", peer.bytes)


def _tick(collector: Collector) -> None:
    try:
        collector.tick()
    except Exception:  # what failed is not due any more; the next tick does the rest
        logger.exception("left out an answer that cannot be given")


def _send(socket: zmq.Socket[bytes], collector: Collector) -> None:
    for peer, frames in collector.outbox:
        try:
            socket.send_multipart([peer, *frames], zmq.NOBLOCK)
        except zmq.Again:  # the peer is gone
            logger.warning("%s does not take its messages", peer)
    collector.outbox.clear()


def main() -> None:
    """Run the collector for the address, the parent's process id and the epoch given as arguments.

    With ``VLLM_LOGGING_LEVEL=DEBUG`` it logs which positions of which sequences each step held.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper(),
        format="%(levelname)s %(asctime)s moescope collector: %(message)s",
    )
    run(sys.argv[1], Settings.from_env(), int(sys.argv[2]), int(sys.argv[3]))
