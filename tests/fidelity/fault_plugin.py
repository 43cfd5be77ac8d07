"""A vLLM plugin of the tests: moescope's transport in this process fails now and then.

Found by a ``dist-info`` directory that `install` writes. In the worker it drops rows as a full
queue does, takes a step for one whose hook did not run, and gives up whole messages as a link does
whose collector hangs; everywhere it delays what a link sends.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

VARIABLE = "MOESCOPE_TEST_FAULTS"
"""JSON: the chance of each fault a message, and the seed."""
MAX_DELAY_S = 0.05

_METADATA = "Metadata-Version: 2.1\nName: moescope-faults\nVersion: 0\n"
_ENTRY_POINTS = "[vllm.general_plugins]\nmoescope_faults = tests.fidelity.fault_plugin:register\n"


def install(directory: Path) -> None:
    """Write the metadata by which vLLM finds the plugin."""
    info = directory / "moescope_faults-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(_METADATA)
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)


def environment(directory: Path, chances: dict[str, float], seed: int) -> dict[str, str]:
    """Return the variables of a server with the plugin."""
    path = os.pathsep.join([str(directory), str(Path.cwd()), *filter(None, sys.path)])
    return {"PYTHONPATH": path, VARIABLE: json.dumps({"seed": seed, **chances})}


def register() -> None:
    """Wrap the transport once; vLLM calls this in every process."""
    if VARIABLE not in os.environ:
        return
    from moescope_service.capture.recorder import Recorder
    from moescope_service.link import Link

    if not hasattr(Link, "faults"):
        Link.faults = Faults(json.loads(os.environ[VARIABLE]))
        Link.faults.wrap(Link, Recorder)


class Faults:
    """Decides when something fails.

    Args:
        chances: ``rows_lost``, ``given_up`` and ``delay`` a message; ``seed``.
    """

    def __init__(self, chances: dict[str, float]) -> None:
        self._chances = chances
        self._rng = random.Random(chances["seed"])

    def happens(self, fault: str) -> bool:
        return self._rng.random() < self._chances[fault]

    def wrap(self, link: Any, recorder: Any) -> None:
        put, send, take_rows = link.put, link._send, recorder._take_rows

        def put_or_give_up(one: Any, message: Any, *, at_once: bool = True) -> bool:
            if hasattr(message, "encoder") and self.happens("given_up"):
                one.num_given_up += 1
                return False
            return put(one, message, at_once=at_once)

        def send_late(one: Any, socket: Any) -> None:
            if one._waiting and self.happens("delay"):
                time.sleep(self._rng.random() * MAX_DELAY_S)
            send(one, socket)

        def take_or_lose(one: Any, num_rows: int) -> Any:
            rows = take_rows(one, num_rows)
            if isinstance(rows, str) or not self.happens("rows_lost"):
                return rows
            rows.discard()
            return self._rng.choice(["queue_full", "hook_missed"])

        link.put, link._send, recorder._take_rows = put_or_give_up, send_late, take_or_lose
