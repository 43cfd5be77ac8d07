"""The differences between arms as a table."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from moescope.overhead.comparison import METRICS


def render(values: dict[str, Any]) -> Table:
    """Return a table of what timing.json holds: a row a metric, a column an arm."""
    differences = values["differences"]
    table = Table(box=box.SIMPLE, caption="n.d.: not distinguishable from zero")
    table.add_column(f"change to {next(iter(values['arms']))} in %")
    for arm in differences:
        table.add_column(arm, justify="right")
    first = next(iter(differences.values()))
    for metric in METRICS:
        if metric in first:
            table.add_row(METRICS[metric], *(_cell(one[metric]) for one in differences.values()))
    return table


def _cell(one: dict[str, Any]) -> str:
    low, high = one["claim_percent"]
    mark = "     " if one["distinguishable"] else " n.d."
    return f"{one['percent']:+.1f} [{low:+.1f}, {high:+.1f}]{mark}"
