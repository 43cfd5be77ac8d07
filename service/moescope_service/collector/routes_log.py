"""The route log: one JSON line a routed token and logged layer, as ``VLLM_LOG_MOE`` wants it."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from moescope import formats
from moescope.trace import RouteTrace
from moescope_service.messages import Hello

_MAX_WAITING = 256


class RoutesLog:
    """Writes finished traces from a thread of its own; appends to an existing file.

    A full queue makes the collector wait, and in the end the workers drop rows and count them:
    no trace is left out of the log silently.

    Args:
        path: The file.
        layers: Global layer numbers to log; the first MoE layer where None.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, layers: Sequence[int] | None) -> None:
        self._layers = layers
        self._file = path.open("ab")
        self._waiting: queue.Queue[RouteTrace | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="moescope-routes-log", daemon=True)

    def begin(self, hello: Hello) -> None:
        """Write the meta line; called once, before any trace."""
        self._layers = self._layers or hello.layers[:1]
        meta = formats.meta_line(
            model=hello.model,
            versions=hello.versions,
            device=hello.device,
            seed=hello.seed,
            layers=self._layers,
            top_k=hello.top_k,
            num_experts=hello.num_experts,
        )
        self._file.write(meta)
        self._file.flush()
        self._thread.start()

    def write(self, trace: RouteTrace) -> None:
        """Log a finished trace."""
        self._waiting.put(trace)

    def close(self) -> None:
        """Write what waits, then close the file."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        self._file.close()

    def _run(self) -> None:
        failed = False
        while (trace := self._waiting.get()) is not None:
            if failed:
                continue
            try:
                self._file.writelines(formats.route_lines(trace.select(layers=self._layers)))
                self._file.flush()
            except Exception as error:  # noqa: BLE001 - a dead thread would stop the collector
                failed = True
                print(f"moescope: the route log ends here: {error}", file=sys.stderr, flush=True)
