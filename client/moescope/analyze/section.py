"""A figure of the report: its picture, its table, its numbers and what is said of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from moescope.analysis import Profile
from moescope.analyze.batches import Model

Cell = str | int | float
NAMES = (
    *("load", "balance", "coverage", "phases", "positions", "domains"),
    *("co_activation", "transitions", "next_layer"),
    *("vocabulary", "similarity", "effective_experts"),
)
"""Of all sections, in their order."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is analyzed."""

    profile: Profile
    model: Model
    num_missing: int = 0
    """Rows that were not captured."""
    token_texts: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """By token id; empty where they are not known."""

    @property
    def layers(self) -> list[int]:
        """Global layer numbers."""
        return list(self.model.layers)

    @property
    def num_rows(self) -> int:
        """Rows that were counted."""
        return self.profile.load.num_rows

    def __str__(self) -> str:
        """Say it in a line."""
        return (
            f"{self.model} · {self.profile.num_requests:,} requests · "
            f"{self.num_rows:,} routed tokens"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One figure."""

    name: str
    """One of `NAMES`: that of its files."""
    title: str
    about: str
    """What it is and how to read it."""
    picture: Figure
    header: Sequence[str]
    """Of the table."""
    lines: Sequence[Sequence[Cell]]
    numbers: Mapping[str, Any]
    """What `analysis.json` has: scalars and small arrays."""


def lines_by_layer(layers: Sequence[int], *columns: npt.NDArray[Any]) -> list[tuple[Cell, ...]]:
    """Return the lines of a table with a line a layer.

    Args:
        layers: Global layer numbers, ``[num_layers]``.
        columns: ``[num_layers]`` each.
    """
    values = np.stack(columns, axis=1).tolist()
    return [(layer, *line) for layer, line in zip(layers, values, strict=True)]
