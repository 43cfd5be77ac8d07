"""The route log: one JSON line a routed token and logged layer, as ``VLLM_LOG_MOE`` wants it."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from moescope import formats
from moescope.records import LogInfo
from moescope.trace import RouteTrace
from moescope_service.limited_logger import LimitedLogger
from moescope_service.messages import CaptureSpec

logger = logging.getLogger("moescope.collector")

MAX_WAITING_BYTES = 64 * 2**20
"""Traces that wait to be written; most of them are in the store too, and take nothing more."""
_OVERHEAD_BYTES = 2048
"""What a waiting trace takes beside its arrays."""
_PIECE_LINES = 256
"""Lines that are made and written at once: of a long trace they would take hundreds of MB, and
this thread lets the collector's have the interpreter whenever it writes."""
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0
_CLOSE_S = 25.0
"""Less than the supervisor waits for the collector's end."""
_BEHIND_S = 60.0
"""Shortest time between two messages that traces are left out."""


class File(Protocol):
    """What `RoutesLog` writes to; `moescope_service.collector.log_file.LogFile` is one."""

    def begin(self, meta: bytes) -> None:
        """Set the meta line."""

    def put(self, lines: bytes) -> None:
        """Set what `flush` writes."""

    def flush(self) -> None:
        """Write it, or the rest of it; raises OSError."""

    def close(self) -> None:
        """Close the file."""


class RoutesLog:
    """Writes finished traces from a thread of its own; its callers never wait.

    Where the file takes no more it is tried again, after pauses of 1 s that double up to 30 s, and
    the traces wait. Those that find the queue full are left out and counted: no trace is left out
    of the log silently, and what serves goes on.

    Args:
        file: Where to.
        layers: Global layer numbers to log; the first MoE layer where None.
        max_waiting_bytes: Traces that may wait; one may always, however large it is.
        first_pause_s: The shortest pause, in seconds.
    """

    def __init__(
        self,
        file: File,
        layers: Sequence[int] | None,
        *,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._file = file
        self._layers = layers
        self._max_waiting_bytes = max_waiting_bytes
        self._first_pause_s = first_pause_s
        self._waiting: collections.deque[RouteTrace] = collections.deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()  # guards what waits and what is counted
        self._is_closing = self._is_woken = False
        self._num_dropped = 0
        self._is_behind = False
        self._error: OSError | None = None
        self._behind_logger = LimitedLogger(logger, _BEHIND_S)
        self._thread = threading.Thread(target=self._run, name="moescope-routes-log", daemon=True)

    @property
    def info(self) -> LogInfo:
        """Whether the file takes the traces, and how many it lacks."""
        is_failing = self._is_behind or self._error is not None
        return LogInfo(state="failing" if is_failing else "ok", dropped=self._num_dropped)

    def begin(self, spec: CaptureSpec) -> None:
        """Write the meta line; called once, before any trace."""
        self._layers = self._layers or spec.layers[:1]
        meta = formats.meta_line(
            model=spec.model,
            versions=spec.versions,
            device=spec.device,
            seed=spec.seed,
            layers=self._layers,
            top_k=spec.top_k,
            num_experts=spec.num_experts,
        )
        self._file.begin(meta)
        self._thread.start()

    def write(self, trace: RouteTrace) -> None:
        """Log a finished trace, or count it as dropped where too much waits."""
        size_bytes = _size_bytes(trace)
        with self._changed:
            fits = self._waiting_bytes + size_bytes <= self._max_waiting_bytes
            if fits or not self._waiting:
                self._waiting.append(trace)
                self._waiting_bytes += size_bytes
                self._changed.notify()
                return
            self._num_dropped += 1
            self._is_behind = True
        self._behind_logger.warning(
            "the route log is %d MiB behind: traces are left out of it, and counted",
            self._waiting_bytes // 2**20,
        )

    def wake(self) -> None:
        """Look at once whether the file was moved, and whether it takes lines again."""
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Write what waits, for at most ``timeout_s``, then close the file."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._waiting:
            self._num_dropped += len(self._waiting)
            logger.error("the route log lacks the last %d traces", len(self._waiting))
        if not self._thread.is_alive():
            self._file.close()

    def _run(self) -> None:
        goes_on = self._flush()
        while goes_on:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_woken or self._is_closing)
                self._is_woken = False
                trace = self._waiting[0] if self._waiting else None
                if trace is None and self._is_closing:
                    return
            goes_on = self._flush() if trace is None else self._log(trace)

    def _log(self, trace: RouteTrace) -> bool:
        try:
            for lines in self._pieces(trace):
                if not self._flush(lines):
                    return False
        except Exception:  # a dead thread would log no other trace either
            logger.exception("left a trace out of the route log, of %s", trace.request_id)
            with self._changed:
                self._num_dropped += 1
        with self._changed:
            self._waiting.popleft()
            self._waiting_bytes -= _size_bytes(trace)
        return True

    def _pieces(self, trace: RouteTrace) -> Iterator[bytes]:
        layers = self._layers or ()
        num_rows = max(1, _PIECE_LINES // max(1, len(layers)))
        for start in range(0, trace.num_rows, num_rows):
            page = trace.page(start, num_rows).select(layers=layers)
            yield b"".join(formats.route_lines(page))

    def _flush(self, lines: bytes = b"") -> bool:
        """Write lines, as often as it takes; returns False where the log was closed meanwhile."""
        self._file.put(lines)
        pause_s = self._first_pause_s
        while True:
            try:
                self._file.flush()
            except OSError as error:
                self._fail(error)
                if self._is_closing:
                    return False
                with self._changed:
                    self._changed.wait_for(lambda: self._is_woken or self._is_closing, pause_s)
                    self._is_woken = False
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            else:
                self._recover()
                return True

    def _fail(self, error: OSError) -> None:
        if self._error is None:
            logger.error(
                "cannot write the route log: %s; it is tried again every %g s at the latest, and "
                "traces wait until %d MiB do: later ones are left out, and counted",
                error.strerror or error, _MAX_PAUSE_S, self._max_waiting_bytes // 2**20,
            )  # fmt: skip
        self._error = error

    def _recover(self) -> None:
        if self._error is not None:
            logger.warning("the route log goes on; it lacks %d traces so far", self._num_dropped)
        self._error, self._is_behind = None, False


def _size_bytes(trace: RouteTrace) -> int:
    return trace.size_bytes + _OVERHEAD_BYTES
