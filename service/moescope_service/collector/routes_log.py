"""The route log: one JSON line a routed token and logged layer, as ``VLLM_LOG_MOE`` wants it."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from moescope import formats
from moescope.trace import RouteTrace
from moescope_service.messages import Hello

_MAX_WAITING = 256


class RoutesLog:
    """Writes finished traces from a thread of its own; appends to an existing file.

    A full queue makes the collector wait, and in the end the workers drop rows and count them:
    no trace is left out of the log silently. Where the file takes no more, the log ends with a
    word to standard error, and the collector goes on.

    Args:
        path: The file.
        layers: Global layer numbers to log; the first MoE layer where None.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, layers: Sequence[int] | None) -> None:
        self._layers = layers
        # A collector that was killed may have left half a line: the next one begins a line anew.
        self._before = b"\n" if _is_torn(path) else b""
        self._file = path.open("ab")
        self._waiting: queue.Queue[bytes | RouteTrace | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="moescope-routes-log", daemon=True)

    def begin(self, hello: Hello) -> None:
        """Write the meta line; called once, before any trace."""
        self._layers = self._layers or hello.layers[:1]
        self._thread.start()
        meta = formats.meta_line(
            model=hello.model,
            versions=hello.versions,
            device=hello.device,
            seed=hello.seed,
            layers=self._layers,
            top_k=hello.top_k,
            num_experts=hello.num_experts,
        )
        self._waiting.put(self._before + meta)

    def write(self, trace: RouteTrace) -> None:
        """Log a finished trace."""
        self._waiting.put(trace)

    def close(self) -> None:
        """Write what waits, then close the file."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        with contextlib.suppress(OSError):  # what the disk had no room for was told already
            self._file.close()

    def _run(self) -> None:
        failed = False
        while (item := self._waiting.get()) is not None:
            if failed:
                continue
            try:
                self._file.writelines(self._lines(item))
                self._file.flush()
            except Exception as error:  # noqa: BLE001 - a dead thread would stop the collector
                failed = True
                print(f"moescope: the route log ends here: {error}", file=sys.stderr, flush=True)

    def _lines(self, item: bytes | RouteTrace) -> Iterable[bytes]:
        if isinstance(item, bytes):
            return [item]
        return formats.route_lines(item.select(layers=self._layers))


def _is_torn(path: Path) -> bool:
    """Whether a file is there whose last line has no end."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
