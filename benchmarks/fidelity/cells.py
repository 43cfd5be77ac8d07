"""Cells of the fidelity table: what one test compared, and what came of it.

A test calls `record`; where the variable ``MOESCOPE_CELLS`` names a file, the cell is appended to
it as a line of JSON. ``python -m benchmarks.fidelity.table`` makes the table of such files.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import os
from pathlib import Path
from typing import Any

import orjson

VARIABLE = "MOESCOPE_CELLS"


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """One routing scheme in one situation, compared with a reference on the same tokens.

    A *pair* is one (token, layer): the experts of one token in one layer.
    """

    scheme: str
    """How the model routes, and which model: ``softmax, renormalized (Qwen3-MoE)``."""
    situation: str
    """What the requests went through: ``offline, eager``, ``preemption`` …"""
    pairs: int
    """Pairs that the sequences have, missing ones included."""
    equal: int
    """Pairs whose set of experts is the reference's."""
    missing: int
    """Pairs that the trace marks as missing."""
    largest_weight_error: float | None
    """Largest absolute difference of a routing weight from the reference's, of all equal pairs;
    None where ids alone were compared, or it was not kept."""
    layout: str = "1 worker"
    machine: str = "CPU"
    ties: int = 0
    """Of the equal pairs those in which the reference, in float64, would have taken another expert
    that is as probable within the rounding of what was served; it was made to go on with the
    trace's."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: More pairs are equal or missing than there are.
        """
        if not 0 <= self.equal + self.missing <= self.pairs or min(self.equal, self.missing) < 0:
            raise ValueError(f"equal and missing pairs are no part of all pairs: {self}")


@dataclasses.dataclass(frozen=True, slots=True)
class Recorded:
    """A cell with where it was measured."""

    cell: Cell
    date: str
    versions: dict[str, str]


def record(cell: Cell) -> None:
    """Append a cell to the file that ``MOESCOPE_CELLS`` names; do nothing where it is unset."""
    path = os.environ.get(VARIABLE)
    if path:
        today = dt.datetime.now(dt.UTC).date().isoformat()
        line = orjson.dumps(
            {**dataclasses.asdict(cell), "date": today, "versions": _versions()},
            option=orjson.OPT_APPEND_NEWLINE,
        )
        with Path(path).open("ab") as file:  # one write a line: tests may run side by side
            file.write(line)


def read(path: Path) -> list[Recorded]:
    """Return the cells of a file, in order."""
    return [_recorded(orjson.loads(line)) for line in path.read_bytes().splitlines()]


def _recorded(values: dict[str, Any]) -> Recorded:
    date, versions = values.pop("date"), values.pop("versions")
    return Recorded(Cell(**values), date, versions)


@functools.cache
def _versions() -> dict[str, str]:
    import transformers

    from moescope_service.vllm_contract.versions import versions

    return {**versions(), "transformers": transformers.__version__}
