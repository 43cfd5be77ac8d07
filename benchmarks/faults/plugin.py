"""A vLLM plugin: moescope's transport in this process fails now and then.

Found by a ``dist-info`` directory that `install` writes. In the worker it drops rows as a full
queue does, takes a step for one whose hook did not run, and gives up whole messages as a link does
whose collector hangs; everywhere it delays what a link sends. The clock may be stepped: all
processes of vLLM's then see `time.time` jump by an hour, there and back.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from benchmarks import vllm_plugin

VARIABLE = "MOESCOPE_TEST_FAULTS"
"""JSON: the chance of each fault a message, the seed, and how often the clock steps, if it does."""
MAX_DELAY_S = 0.05
CLOCK_STEP_S = 3600.0


def install(directory: Path) -> None:
    """Write the metadata by which vLLM finds the plugin."""
    vllm_plugin.install(directory, "moescope_faults", "benchmarks.faults.plugin:register")


def environment(directory: Path, chances: dict[str, float], seed: int) -> dict[str, str]:
    """Return the variables of a server with the plugin."""
    faults = json.dumps({"seed": seed, **chances})
    return {**vllm_plugin.python_path(directory), VARIABLE: faults}


def register() -> None:
    """Wrap the transport once; vLLM calls this in every process."""
    if VARIABLE not in os.environ:
        return
    from moescope_service.capture.control import StepMessage
    from moescope_service.capture.recorder import Recorder
    from moescope_service.link import Link

    if not hasattr(Link, "faults"):
        chances = json.loads(os.environ[VARIABLE])
        if "clock_every_s" in chances:
            step_clock(chances["clock_every_s"])
        faults = Faults(chances)
        setattr(Link, "faults", faults)  # noqa: B010, to mypy a class has no such attribute
        faults.wrap(Link, Recorder, StepMessage)


def step_clock(every_s: float) -> None:
    """Let the wall clock of this process jump every so many seconds, as those of all others do."""
    wall_s = time.time

    def stepped_s() -> float:
        is_ahead = int(time.monotonic() / every_s) % 2  # whose zero is the machine's start
        return wall_s() + is_ahead * CLOCK_STEP_S

    time.time = stepped_s


class Faults:
    """Decides when something fails.

    Args:
        chances: ``rows_lost``, ``given_up`` and ``delay`` a message; ``seed``.
    """

    def __init__(self, chances: dict[str, float]) -> None:
        self._chances = chances
        self._rng = random.Random(chances["seed"])

    def happens(self, fault: str) -> bool:
        """Return whether a fault happens to this message."""
        return self._rng.random() < self._chances[fault]

    def wrap(self, link: Any, recorder: Any, step: type) -> None:
        """Let the links and recorders of this process fail.

        Args:
            link: The class `moescope_service.link.Link`.
            recorder: The class `moescope_service.capture.recorder.Recorder`.
            step: The class of the messages that are given up: a step's.
        """
        put, send, take_rows = link.put, link._send, recorder._take_rows

        def put_or_give_up(one: Any, message: Any, *, at_once: bool = True) -> bool:
            if isinstance(message, step) and self.happens("given_up"):
                one.num_given_up += 1
                return False
            return bool(put(one, message, at_once=at_once))

        def send_late(one: Any, socket: Any) -> None:
            if (one._waiting or one._source) and self.happens("delay"):
                time.sleep(self._rng.random() * MAX_DELAY_S)
            send(one, socket)

        def take_or_lose(one: Any, num_rows: int) -> Any:
            rows = take_rows(one, num_rows)
            if isinstance(rows, str) or not self.happens("rows_lost"):
                return rows
            rows.discard()
            return self._rng.choice(["queue_full", "hook_missed"])

        link.put, link._send, recorder._take_rows = put_or_give_up, send_late, take_or_lose
