"""The collector's process: a ZMQ ROUTER socket around `Collector`."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import zmq

from moescope_service.addresses import Address, node_address
from moescope_service.collector.archive_queue import ArchiveQueue
from moescope_service.collector.core import Collector
from moescope_service.collector.log_file import check_log
from moescope_service.collector.node_links import listening
from moescope_service.errors import RefusedError
from moescope_service.limited_logger import LimitedLogger
from moescope_service.link import SOCKET_QUEUE, Link
from moescope_service.runtime import directory
from moescope_service.settings import Settings, flag

logger = logging.getLogger("moescope.collector")

_NEVER = 10**6
_TICK_MS = 20
_BETWEEN_PIECES_S = 0.005
"""How long messages are taken in, as long as there are any, before what is done piece by piece
goes on: as long as a piece takes."""


def run(
    address: str, settings: Settings, parent: int, epoch: int, elsewhere: Address | None = None
) -> None:
    """Serve until SIGTERM, or until the process that started this one is gone.

    In the second case it removes the deployment's directory, which nobody else is left to do.

    Prints ``ready`` to standard output once the socket is bound. A message that cannot be
    understood, or what cannot be done when it is due, is logged, once a second at most, counted
    and left out, and the rest goes on. No row becomes a wrong one by that: a step that failed
    halfway is a gap (`Reassembler.apply`), and a process that ended here would take every trace
    with it. At SIGHUP it looks whether the route log was moved.

    Args:
        address: Where to bind, such as ``ipc:///run/…/collector.sock``.
        settings: What is kept, and how much.
        parent: Id of the process that started this one.
        epoch: How many collectors the deployment had before this one.
        elsewhere: Where to bind for other nodes; None: there are none.

    Raises:
        RefusedError: It cannot be bound.
    """
    told = _Signals()
    # A full collection looks at every trace that is kept, 0.5 s for 200,000, and finds nothing.
    gc.set_threshold(*gc.get_threshold()[:2], _NEVER)
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as socket,
        contextlib.ExitStack() as stack,
    ):
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, SOCKET_QUEUE)
        socket.setsockopt(zmq.SNDHWM, 0)
        try:
            socket.bind(address)
            take_refused = stack.enter_context(listening(context, socket, elsewhere))
        except zmq.ZMQError as error:
            where = f"{address} and {flag('bind')} {settings.bind}" if elsewhere else address
            raise RefusedError(f"the collector cannot listen at {where}: {error}") from None
        archive = None if settings.archive is None else archive_queue(address)
        collector = Collector(settings, epoch=epoch, archive=archive)
        limited_logger = LimitedLogger(logger)
        if settings.log is not None:
            logger.info("the route log is %s; its process is %d", settings.log, os.getpid())
        print("ready", flush=True)
        next_tick_s, is_busy = 0.0, False
        while not told.stops and os.getppid() == parent:
            if socket.poll(0 if is_busy else _TICK_MS):
                _receive(socket, collector, limited_logger)
            until_s = time.monotonic() + _BETWEEN_PIECES_S
            while is_busy and time.monotonic() < until_s and socket.poll(0):
                _receive(socket, collector, limited_logger)
            is_busy = _work(collector, limited_logger)
            if time.monotonic() >= next_tick_s:
                _tick(collector, limited_logger)
                collector.state.stats.links_refused += take_refused()
                if told.take_reopens():
                    collector.reopen_log()
                next_tick_s = time.monotonic() + _TICK_MS / 1000
            _send(socket, collector, limited_logger)
        while socket.poll(0):
            _receive(socket, collector, limited_logger)
        collector.close()
    if not told.stops:
        directory.remove(Path(address.removeprefix("ipc://")).parent)


def archive_queue(address: str) -> ArchiveQueue:
    """Return the way to the archive's process of the collector at an address."""

    def carry(queue: ArchiveQueue) -> Link:
        return Link(
            directory.archive_beside(address),
            queue.on_message,
            name="moescope-archive-queue",
            source=queue,
            introduce=queue.introduce,
            on_away=queue.on_away,
        )

    return ArchiveQueue(carry)


class _Signals:
    """What the process was told: SIGTERM stops it, SIGHUP is for the route log.

    SIGINT is the server's, which then stops the collector.
    """

    def __init__(self) -> None:
        self.stops = False
        self._reopens = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGHUP, self._reopen)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def take_reopens(self) -> bool:
        """Return whether a SIGHUP came since the last call."""
        reopens, self._reopens = self._reopens, False
        return reopens

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.stops = True

    def _reopen(self, signum: int, frame: FrameType | None) -> None:
        self._reopens = True


def _receive(
    socket: zmq.Socket[bytes], collector: Collector, limited_logger: LimitedLogger
) -> None:
    peer, *frames = socket.recv_multipart(copy=False)
    try:
        collector.handle(peer.bytes, [frame.buffer for frame in frames])
    except Exception:
        collector.state.stats.errors += 1
        limited_logger.exception("left out a message of %s that cannot be understood", peer.bytes)


def _work(collector: Collector, limited_logger: LimitedLogger) -> bool:
    try:
        return collector.work()
    except Exception:  # its query is not answered; there may be others
        collector.state.stats.errors += 1
        limited_logger.exception("left out a reply that cannot be made")
        return True


def _tick(collector: Collector, limited_logger: LimitedLogger) -> None:
    limited_logger.tick()
    try:
        collector.tick()
    except Exception:  # what failed is not due any more; the next tick does the rest
        collector.state.stats.errors += 1
        limited_logger.exception("left out an answer that cannot be given")


def _send(socket: zmq.Socket[bytes], collector: Collector, limited_logger: LimitedLogger) -> None:
    for peer, frames in collector.state.outbox:
        try:
            # All frames are made before the first one is sent: half a message would spoil the next.
            parts = [zmq.Frame(frame, copy=True) for frame in (peer, *frames)]
            socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:  # the peer is gone
            limited_logger.warning("%s does not take its messages", peer)
        except Exception:
            collector.state.stats.errors += 1
            limited_logger.exception("left out a message to %s that cannot be sent", peer)
    collector.state.outbox.clear()


def main() -> None:
    """Run the collector for the address, the parent's process id and the epoch given as arguments.

    With ``VLLM_LOGGING_LEVEL=DEBUG`` it logs which positions of which sequences each step held.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper(),
        format="%(levelname)s %(asctime)s moescope collector: %(message)s",
    )
    settings, epoch = Settings.from_env(), int(sys.argv[3])
    try:
        # A later collector has traces to keep, and tries the log again.
        if settings.log is not None and not epoch:
            check_log(settings.log, settings.log_max_bytes)
    except OSError as error:
        sys.exit(f"moescope: {flag('log')}: cannot write {error.filename}: {error.strerror}")
    try:
        run(sys.argv[1], settings, int(sys.argv[2]), epoch, node_address(settings))
    except RefusedError as error:
        sys.exit(f"moescope: {error}")
