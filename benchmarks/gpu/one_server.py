"""Arms that share one server: the capture is taken off its worker and put back between visits.

Two starts of one and the same vLLM can differ by a percent in the time of a small step. What a step
of capture costs shows within a single server. ``detached`` is that server with the capture's
functions around each step taken off. What stays, in all arms: routers write to addresses of ours
(in steps that no CUDA graph replays, through our Python), the API server tells the collector of
every request, and the collector waits for those of which no worker tells. Servers of their own show
what that costs, as far as their starts let one see.

Where routes are counted, the worker tells of its steps once a second: some are booked with the arm
that comes next. That moves no time that is compared.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from moescope import Client
from moescope.errors import CommandError
from moescope.overhead.arms import AGAIN, COUNTS, MOESCOPE, PAUSED, Arm
from moescope.overhead.hosting import Launcher, StartedArms
from moescope.servers import wait_ready

DETACHED = "detached"
DETACHED_AGAIN = DETACHED + AGAIN
DEFAULT = (DETACHED, DETACHED_AGAIN, MOESCOPE, PAUSED)
ARMS = (*DEFAULT, COUNTS)
"""A server captures rows or counts them: `COUNTS` goes with detached ones alone."""

_ATTACHED = "attached"
_SIGNALS = {DETACHED: signal.SIGUSR1, _ATTACHED: signal.SIGUSR2}
_SWITCH_TIMEOUT_S = 10.0


def make_detachable(state: Path) -> None:
    """Let signals take the capture off this process's worker, and put it back.

    Args:
        state: Where to write the process's id and how the capture stands.
    """
    from moescope_service.capture import install

    capture: Any = install.WorkerCapture
    record = capture._record

    @functools.wraps(record)
    def record_detachably(self: Any) -> None:
        runner = self._runner
        bare = runner.execute_model
        record(self)
        by_state = {DETACHED: bare, _ATTACHED: runner.execute_model}

        def switch(name: str) -> None:
            runner.execute_model = by_state[name]
            new = state.with_suffix(".new")
            new.write_text(f"{os.getpid()} {name}")
            new.replace(state)

        for name, number in _SIGNALS.items():
            signal.signal(number, lambda *_, name=name: switch(name))
        switch(_ATTACHED)

    capture._record = record_detachably


class OneServer:
    """An arrangement of all arms in `ARMS`.

    Args:
        url: The server's address.
        state: The file that says how the capture stands.
    """

    stays_up: ClassVar[bool] = True

    def __init__(self, url: str, state: Path) -> None:
        self._url, self._state = url, state

    @contextlib.contextmanager
    def visit(self, name: str) -> Iterator[str]:
        """Bring the server into the state that an arm names; give its address.

        Pausing is left to `moescope.overhead.arms.prepare`.
        """
        self._switch(DETACHED if name in {DETACHED, DETACHED_AGAIN} else _ATTACHED)
        yield self._url
        if name == PAUSED:
            with Client(self._url) as client:
                client.resume()

    def _switch(self, wanted: str) -> None:
        deadline_s = time.monotonic() + _SWITCH_TIMEOUT_S
        pid, state = self._state.read_text().split()
        if state != wanted:
            os.kill(int(pid), _SIGNALS[wanted])
        while not self._state.read_text().endswith(wanted):
            if time.monotonic() > deadline_s:
                raise CommandError(f"the capture is not {wanted} after {_SWITCH_TIMEOUT_S:g} s")
            time.sleep(0.01)


@contextlib.contextmanager
def start_arms(launcher: Launcher, names: Sequence[str], state: Path) -> Iterator[StartedArms]:
    """Start the server; end it afterwards.

    Args:
        launcher: How; its environment has `benchmarks.gpu.tap.switching`.
        names: Of `ARMS`.
        state: The file that the environment names.

    Raises:
        CommandError: It does not start.
    """
    with launcher.server(Arm(name=COUNTS if COUNTS in names else MOESCOPE)) as server:
        wait_ready([server], launcher.timeout_s)
        yield StartedArms(
            arms=[Arm(name=name) for name in names], arrangement=OneServer(server.url, state)
        )
