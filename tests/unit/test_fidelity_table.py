"""The fidelity table says what was recorded."""

from __future__ import annotations

import pytest

from benchmarks.fidelity.cells import Cell, Recorded
from benchmarks.fidelity.table import make_table


def recorded(cell: Cell, date: str = "2026-01-01") -> Recorded:
    return Recorded(cell, date, {"vllm": "0.32.0"})


def test_a_shared_situation_is_a_column_and_any_other_a_line() -> None:
    table = make_table(
        [
            recorded(Cell("sigmoid", "offline", 2000, 2000, 0, 1e-8)),
            recorded(Cell("softmax", "offline", 10, 9, 1, 2e-8, ties=2)),
            recorded(Cell("softmax", "preemption", 7, 7, 0, 0.0, layout="TP 2", machine="H200")),
        ]
    )
    assert "| scheme | offline |" in table
    assert "| sigmoid | 2,000 / 2,000 / 0 |" in table
    assert "| softmax | 10 / 9 / 1 |" in table
    assert "| softmax | pairs / equal / missing |" in table
    assert "| preemption, TP 2, H200 | 7 / 7 / 0 |" in table
    assert "In all 2,017 pairs: 2,016 equal, 2 of them ties, 1 missing; 3 cells." in table
    assert "| softmax | offline | 1 worker | CPU | 10 | 9 | 2 | 1 | 2.0e-08 | 2026-01-01 |" in table


def test_a_cell_counts_as_recorded_last() -> None:
    first = recorded(Cell("softmax", "offline", 10, 9, 0, 0.0))
    table = make_table([first, recorded(Cell("softmax", "offline", 20, 20, 0, 0.0))])
    assert "In all 20 pairs: 20 equal, 0 of them ties, 0 missing; 1 cells." in table


def test_a_cell_cannot_have_more_equal_pairs_than_pairs() -> None:
    with pytest.raises(ValueError, match="no part of all pairs"):
        Cell("softmax", "offline", 10, 9, 2, 0.0)
