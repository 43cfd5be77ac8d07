"""A tcp proxy that records what passes, and cuts or stalls it."""

from __future__ import annotations

import selectors
import socket
import threading
from typing import Self

_POLL_S = 0.05
_CHUNK_BYTES = 2**16


class TcpProxy:
    """Passes connections on, from a port of its own, in a thread.

    Args:
        target: Host and port of where to.
        is_recording: Whether to keep what passes.
    """

    def __init__(self, target: tuple[str, int], *, is_recording: bool = False) -> None:
        self._target = target
        self._is_recording = is_recording
        self._recorded = bytearray()
        self._lock = threading.Lock()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._is_cut = self._is_ending = False
        self._may_pass = threading.Event()
        self._may_pass.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def recorded(self) -> bytes:
        """What passed so far, in both directions."""
        with self._lock:
            return bytes(self._recorded)

    @property
    def num_connections(self) -> int:
        """Connections that are open now."""
        with self._lock:
            return len(self._pairs) // 2

    def __enter__(self) -> Self:
        """Start to pass connections on."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End every connection, and the thread."""
        self._is_ending = True
        self._thread.join()

    def cut(self) -> None:
        """End every connection, and each new one at once, until `mend`."""
        with self._lock:
            self._is_cut = True
            while self._pairs:
                self._close(next(iter(self._pairs)))

    def stall(self) -> None:
        """Let nothing pass, and keep the connections open, until `mend`."""
        self._may_pass.clear()

    def mend(self) -> None:
        """Pass connections on again."""
        self._is_cut = False
        self._may_pass.set()

    def _run(self) -> None:
        while not self._is_ending:
            ready = [key.fileobj for key, _ in self._selector.select(_POLL_S)]
            if not self._may_pass.wait(_POLL_S):
                continue
            with self._lock:
                for one in ready:
                    if one is self._listener:
                        self._accept()
                    elif one in self._pairs and isinstance(one, socket.socket):
                        self._pass_on(one)
        with self._lock:
            while self._pairs:
                self._close(next(iter(self._pairs)))
            self._listener.close()
            self._selector.close()

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self._is_cut:
            near.close()
            return
        try:
            far = socket.create_connection(self._target, timeout=5)
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            one.settimeout(5)
            self._pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, one: socket.socket) -> None:
        try:
            some = one.recv(_CHUNK_BYTES)
            self._pairs[one].sendall(some)
        except OSError:
            some = b""
        if not some:
            self._close(one)
        elif self._is_recording:
            self._recorded += some

    def _close(self, one: socket.socket) -> None:
        for end in (one, self._pairs[one]):
            del self._pairs[end]
            self._selector.unregister(end)
            end.close()
