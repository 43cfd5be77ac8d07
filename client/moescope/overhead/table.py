"""The differences between arms as a table."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from moescope.overhead import comparison


def render(values: dict[str, Any]) -> Table:
    """Return a table of those differences in timing.json that tell something, by metric and arm."""
    differences = values["differences"]
    captions = ("n.d.: not distinguishable from zero", comparison.left_out(differences))
    table = Table(box=box.SIMPLE, caption="\n".join(filter(None, captions)))
    table.add_column(f"change to {next(iter(values['arms']))}")
    table.add_column("arm", overflow="fold")
    for head in ("in %", "95% interval", ""):
        table.add_column(head, justify="right", no_wrap=True)
    for metric, words in comparison.telling(differences).items():
        for number, (arm, one) in enumerate(differences.items()):
            table.add_row("" if number else words, arm, *_cells(one[metric]))
    return table


def _cells(one: dict[str, Any]) -> tuple[str, str, str]:
    low, high = one["claim_percent"]
    mark = "" if one["distinguishable"] else "n.d."
    return f"{one['percent']:+.1f}", f"[{low:+.1f}, {high:+.1f}]", mark
