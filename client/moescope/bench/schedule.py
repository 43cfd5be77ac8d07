"""When requests are sent in an open loop: at times that do not depend on responses."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from moescope.errors import CommandError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RampUp:
    """A rate that grows from the first request to the last, by the request's number."""

    strategy: Literal["linear", "exponential"]
    start_rps: float
    """Rate at the first request, in requests a second."""
    end_rps: float
    """Rate at the last one."""


def due_times(
    num: int,
    *,
    request_rate: float = math.inf,
    burstiness: float = 1.0,
    ramp_up: RampUp | None = None,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """Return when each request is due.

    The gaps are independent draws of a gamma distribution with the shape ``burstiness`` and the
    mean of one over the rate: 1 makes a Poisson process, less comes in bursts, more is steadier,
    infinity has equal gaps. Without a ramp all times are scaled so that the last is due after
    ``num / request_rate`` seconds: the rate is then the given one for every seed.

    Source: vLLM 0.32.0, ``vllm/benchmarks/serve.py``, ``get_request``.

    Args:
        num: How many requests.
        request_rate: Requests a second; infinity: all at once.
        burstiness: Shape of the gamma distribution.
        ramp_up: A rate that grows, in place of the request rate.
        seed: The same seed gives the same times.

    Returns:
        Seconds from the start, ascending, ``[num]``.

    Raises:
        CommandError: A rate or the burstiness is not positive, or a rate and a ramp-up are given.
    """
    if ramp_up and not math.isinf(request_rate):
        raise CommandError(
            f"invalid --request-rate {request_rate:g} with a ramp-up: expected one of the two"
        )
    rates = _rates(num, ramp_up) if ramp_up else np.full(num, float(request_rate))
    if not (rates > 0).all():
        raise CommandError(f"invalid request rate {rates.min():g}: expected more than 0")
    if not burstiness > 0:
        raise CommandError(f"invalid --burstiness {burstiness:g}: expected more than 0")
    if math.isinf(burstiness):
        gaps = 1.0 / rates
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rates * burstiness))
    due_s: npt.NDArray[np.float64] = np.cumsum(gaps)
    if ramp_up is None and due_s[-1] > 0:
        due_s *= num / request_rate / due_s[-1]
    return due_s


def _rates(num: int, ramp_up: RampUp) -> npt.NDArray[np.float64]:
    progress = np.arange(num) / max(num - 1, 1)
    start, end = ramp_up.start_rps, ramp_up.end_rps
    if ramp_up.strategy == "linear":
        return start + (end - start) * progress
    if start <= 0 or end <= 0:
        raise CommandError(f"invalid request rate {min(start, end):g}: expected more than 0")
    return np.asarray(start * (end / start) ** progress)


class Pacer:
    """Calls a function on the event loop at each due time, from a thread that only waits.

    The thread wakes within some 50 us; the event loop's own timers round up to milliseconds.

    Args:
        due_s: Seconds from the start, ascending.
        start_s: The start, by ``clock``.
        arrive: Called on the event loop with the number of the request that is due.
        clock: Seconds from a monotonic clock.
    """

    def __init__(
        self,
        due_s: Sequence[float],
        start_s: float,
        arrive: Callable[[int], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._due_s, self._start_s, self._arrive, self._clock = due_s, start_s, arrive, clock
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pacer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        for number, due_s in enumerate(self._due_s):
            wait_s = self._start_s + due_s - self._clock()
            if (wait_s > 0 and self._stop.wait(wait_s)) or self._stop.is_set():
                return
            self._loop.call_soon_threadsafe(self._arrive, number)
