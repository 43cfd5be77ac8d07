"""What ``moescope diff`` finds, of which servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from moescope.analyze.inputs import Input
from moescope.diff.comparing import Comparison
from moescope.diff.findings import Finding
from moescope.diff.side import Side


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A server's routes."""

    name: str
    """What they are called on the command line."""
    inputs: Sequence[Input]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was found of A, B and, where it is there, A again."""

    sources: Sequence[Source]
    sides: Sequence[Side]
    comparison: Comparison
    """Of A and B."""
    again: Comparison | None
    """Of A and A again."""
    found: Mapping[str, Finding]
    """The figures by their names."""
    near_tie: float
    seed: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Global layer numbers."""
        return self.sides[0].model.layers
