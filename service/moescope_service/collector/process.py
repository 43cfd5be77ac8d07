"""The collector's process: a ZMQ ROUTER socket around `Collector`."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

import zmq

from moescope_service.collector.core import Collector
from moescope_service.settings import Settings

logger = logging.getLogger("moescope.collector")

_TICK_MS = 20


def run(address: str, settings: Settings, parent: int) -> None:
    """Serve until SIGTERM, or until the process that started this one is gone.

    In the second case it removes the deployment's directory, which nobody else is left to do.

    Prints ``ready`` to standard output once the socket is bound. A message that cannot be
    understood is logged and left out: serving goes on.

    Args:
        address: Where to bind, such as ``ipc:///run/…/collector.sock``.
        settings: What is kept, and how much.
        parent: Id of the process that started this one.
    """
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then stops us
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.bind(address)
        collector = Collector(settings)
        print("ready", flush=True)
        while not stopped and os.getppid() == parent:
            if socket.poll(_TICK_MS):
                _receive(socket, collector)
            collector.tick()
            _send(socket, collector)
        while socket.poll(0):
            _receive(socket, collector)
        collector.close()
    if not stopped:
        shutil.rmtree(Path(address.removeprefix("ipc://")).parent, ignore_errors=True)


def _receive(socket: zmq.Socket[bytes], collector: Collector) -> None:
    peer, *frames = socket.recv_multipart(copy=False)
    try:
        collector.handle(peer.bytes, [frame.buffer for frame in frames])
    except (KeyError, TypeError, ValueError, IndexError):
        logger.exception("left out a message of %s that cannot be understood", peer.bytes)


def _send(socket: zmq.Socket[bytes], collector: Collector) -> None:
    for peer, frames in collector.outbox:
        try:
            socket.send_multipart([peer, *frames], zmq.NOBLOCK)
        except zmq.Again:  # the peer is gone
            logger.warning("%s does not take its messages", peer)
    collector.outbox.clear()


def main() -> None:
    """Run the collector for the address and the parent's process id that are given as arguments.

    With ``VLLM_LOGGING_LEVEL=DEBUG`` it logs which positions of which sequences each step held.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("VLLM_LOGGING_LEVEL", "INFO"),
        format="%(levelname)s %(asctime)s moescope collector: %(message)s",
    )
    run(sys.argv[1], Settings.from_env(), int(sys.argv[2]))
