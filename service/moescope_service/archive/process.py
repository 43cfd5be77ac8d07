"""The archive's process: a ZMQ ROUTER socket around `Archive`."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import zmq

from moescope.archive.store import Store
from moescope.errors import CommandError
from moescope_service.archive.core import Archive
from moescope_service.limited_logger import LimitedLogger
from moescope_service.link import SOCKET_QUEUE
from moescope_service.settings import Settings, flag

logger = logging.getLogger("moescope.archive")

_TICK_MS = 50
_LOCK_WAIT_S = 20.0
"""Longer than the process of a server that was killed goes on for."""
_LAST_S, _QUIET_S = 12.0, 1.0
"""How long what is on its way is waited for at the end, and how long nothing may come."""


def run(address: str, store: Store, settings: Settings, parent: int) -> None:
    """Serve until SIGTERM, or until the process that started this one is gone; then publish all.

    Prints ``ready`` to standard output once the socket is bound. A message that cannot be
    understood is logged, once a second at most, and left out.

    Args:
        address: Where to bind, such as ``ipc:///run/…/archive.sock``.
        store: Where the files are.
        settings: How often files are published, and when they leave.
        parent: Id of the process that started this one.
    """
    stopped: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.append(signum)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # is the server's, which then stops this process
    limited_logger = LimitedLogger(logger)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.RCVHWM, SOCKET_QUEUE)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.bind(address)
        archive = Archive(store, settings)
        print("ready", flush=True)
        next_tick_s = 0.0
        while not stopped and os.getppid() == parent:
            if socket.poll(0 if archive.is_busy else _TICK_MS):
                _receive(socket, archive, limited_logger)
            if time.monotonic() >= next_tick_s or archive.is_busy:
                limited_logger.tick()
                archive.tick()
                next_tick_s = time.monotonic() + _TICK_MS / 1000
            _send(socket, archive, limited_logger)
        end_s = time.monotonic() + _LAST_S
        quiet_ms = 0 if stopped else int(1000 * _QUIET_S)  # else the collector ends after us
        while time.monotonic() < end_s and socket.poll(quiet_ms):
            _receive(socket, archive, limited_logger)
        archive.close()
        _send(socket, archive, limited_logger)


def _receive(socket: zmq.Socket[bytes], archive: Archive, limited_logger: LimitedLogger) -> None:
    peer, *frames = socket.recv_multipart(copy=False)
    try:
        archive.handle(peer.bytes, [frame.buffer for frame in frames])
    except Exception:
        limited_logger.exception("left out a message of %s that cannot be taken in", peer.bytes)


def _send(socket: zmq.Socket[bytes], archive: Archive, limited_logger: LimitedLogger) -> None:
    for peer, frames in archive.outbox:
        try:
            parts = [zmq.Frame(frame, copy=True) for frame in (peer, *frames)]
            socket.send_multipart(parts, zmq.NOBLOCK)
        except Exception:
            limited_logger.exception("left out a message to %s that cannot be sent", peer)
    archive.outbox.clear()


@contextmanager
def locked(store: Store, wait_s: float = _LOCK_WAIT_S) -> Iterator[None]:
    """Hold a directory for this process alone; an object store cannot be held.

    Args:
        store: Where the files are.
        wait_s: How long to wait for another process that holds it.

    Raises:
        OSError: It cannot be made or written, or another process holds it.
    """
    if not store.is_local:
        yield
        return
    store.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(store.path / "_lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end_s = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end_s:
                    raise OSError(
                        "another server writes it: give each one its own; those of one archive "
                        "are its directories server=NAME"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(file)


def main() -> None:
    """Run the archive for the address and the parent's process id given as arguments."""
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper(),
        format="%(levelname)s %(asctime)s moescope archive: %(message)s",
    )
    settings = Settings.from_env()
    try:
        store = Store(settings.archive or "")
        with locked(store):
            run(sys.argv[1], store, settings, int(sys.argv[2]))
    except (OSError, CommandError) as error:
        sys.exit(f"moescope: {flag('archive')}: cannot write {settings.archive}: {error}")
