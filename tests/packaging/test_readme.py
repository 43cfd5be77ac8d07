"""The README's tables are those of the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from moescope.cli import app
from moescope_service.metric_names import METRICS
from moescope_service.settings import Settings, flag, variable

README = (Path(__file__).parents[2] / "README.md").read_text()


def first_cells(start: str) -> set[str]:
    """Return the names in the first column of the table under a heading."""
    section = README.split(start, 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE))


def test_every_flag_is_documented() -> None:
    names = {field.name for field in dataclasses.fields(Settings)}
    assert first_cells("## Serving") == {flag(name) for name in names}
    for name in names:
        assert f"`{variable(name)}`" in README


def test_every_metric_is_documented_with_its_labels() -> None:
    section = README.split("## Metrics", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", section, re.MULTILINE)
    documented = {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert documented == {spec.sample_name: spec.labels for spec in METRICS.values()}


def test_every_command_is_documented() -> None:
    commands = {f"moescope {c.name or c.callback.__name__}" for c in app.registered_commands}
    assert first_cells("## Commands") == commands
