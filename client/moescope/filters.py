"""Which traces of an archive are read: by the time at which they finished, model and adapter."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

OPTIONS = "--since, --until, --model and --lora"
"""What the command line calls them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What a trace has to be; of what is None it may be anything. False where all is None."""

    since_s: float | None = None
    """Finished then or later: Unix time in seconds."""
    until_s: float | None = None
    """Finished before: Unix time in seconds."""
    model: str | None = None
    """The served model's name."""
    lora: str | None = None
    """The adapter's name; ``""``: without one."""

    @property
    def given(self) -> dict[str, Any]:
        """What is not None, by name."""
        return {name: one for name, one in dataclasses.asdict(self).items() if one is not None}

    def __bool__(self) -> bool:
        return bool(self.given)

    def __str__(self) -> str:
        """Say it in words, for messages and reports."""
        words = [
            "" if self.since_s is None else f"finished since {moment(self.since_s)}Z",
            "" if self.until_s is None else f"finished before {moment(self.until_s)}Z",
            "" if self.model is None else f"of the model {self.model!r}",
            "" if self.lora is None else f"with {_adapter(self.lora)}",
        ]
        return ", ".join(filter(None, words))

    def excludes(self, other: Filter) -> bool:
        """Return whether no trace is both what this wants and what another does."""
        begin_s = max(-math.inf if one.since_s is None else one.since_s for one in (self, other))
        end_s = min(math.inf if one.until_s is None else one.until_s for one in (self, other))
        names = ((self.model, other.model), (self.lora, other.lora))
        return begin_s >= end_s or any(
            one is not None and another is not None and one != another for one, another in names
        )


EVERY = Filter()
"""All traces."""


def moment(time_s: float) -> np.datetime64:
    """Return a Unix time as one in UTC, to the second, whatever its year."""
    return np.datetime64(math.floor(time_s), "s")


def _adapter(name: str) -> str:
    return f"the adapter {name!r}" if name else "no adapter"
