"""Draws the dashboards from their own JSON and queries, where no Grafana can run.

``python -m dashboards.draw --prometheus http://localhost:9090 --range 1h --out pictures``
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from matplotlib.figure import Figure
from PIL import Image

from dashboards.build import BOARDS, GENERATED
from dashboards.draw_panels import DRAW, Rect

Ask = Callable[[str], list[dict[str, Any]]]
"""Answers an instant query with the result's series."""

COLUMN_IN, ROW_IN, HEAD_IN = 0.6, 0.29, 0.45
"""Inches of a column and a row of Grafana's grid of 24 columns, and of the dashboard's title."""
DPI, COLORS = 72, 64
STEPS = 120
"""Points of a line."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Answers the queries of panels as Grafana would send them.

    Args:
        ask: The Prometheus.
        range_s: How far the dashboard looks back.
        rate_interval_s: What ``$__rate_interval`` stands for.
        variables: Values of further variables by name; those left out choose everything.
    """

    ask: Ask
    range_s: int
    rate_interval_s: int
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def expression(self, text: str) -> str:
        """Return a panel's expression with its variables filled in."""
        values = {
            "__range": f"{self.range_s}s",
            "__rate_interval": f"{self.rate_interval_s}s",
            **self.variables,
        }
        return re.sub(r"\$(\w+)", lambda found: values.get(found[1], ".+"), text)

    def now(self, text: str) -> list[dict[str, Any]]:
        """Return the series of an expression, each with its latest ``value``."""
        return self.ask(self.expression(text))

    def over_time(self, text: str) -> list[dict[str, Any]]:
        """Return the series of an expression, each with its ``values`` in the time shown."""
        step = max(1, self.range_s // STEPS)
        return self.ask(f"({self.expression(text)})[{self.range_s}s:{step}s]")


def first_values(board: Mapping[str, Any], ask: Ask) -> dict[str, str]:
    """Return the value of every variable that takes a single one, as Grafana first chooses it."""
    chosen: dict[str, str] = {}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query" and not variable["multi"]:
            text = variable["query"].removeprefix("label_values(")[:-1]
            selector, label = text.rsplit(", ", 1)
            found = {one["metric"][label] for one in Source(ask, 1, 1, chosen).now(selector)}
            chosen[variable["name"]] = min(found, key=lambda value: (len(value), value))
    return chosen


def draw(name: str, ask: Ask, path: Path, *, range_s: int, rate_interval_s: int) -> None:
    """Draw one dashboard.

    Args:
        name: ``overview``, ``experts`` or ``serving``.
        ask: Answers an instant query.
        path: The PNG.
        range_s: How far to look back.
        rate_interval_s: What ``$__rate_interval`` stands for: four scrapes or more.
    """
    board = json.loads((GENERATED / f"{name}.json").read_text())
    source = Source(ask, range_s, rate_interval_s, first_values(board, ask))
    bottom = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in board["panels"])
    size_in = (24 * COLUMN_IN, bottom * ROW_IN + HEAD_IN)
    figure = Figure(figsize=size_in, facecolor="#f4f5f5")
    figure.text(0.1 / size_in[0], 1 - 0.3 / size_in[1], board["title"], fontsize=13, weight="bold")
    chosen = ", ".join(f"{key} = {value}" for key, value in source.variables.items())
    told = ", ".join((f"last {range_s / 60:g} min", *([chosen] if chosen else [])))
    figure.text(1 - 0.1 / size_in[0], 1 - 0.3 / size_in[1], told, ha="right")
    for panel in board["panels"]:
        place = panel["gridPos"]
        rect = Rect(
            figure,
            place["x"] * COLUMN_IN,
            (bottom - place["y"] - place["h"]) * ROW_IN,
            place["w"] * COLUMN_IN,
            place["h"] * ROW_IN,
        )
        DRAW[panel["type"]](rect, panel, source)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=DPI)
        Image.open(buffer).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


def main() -> None:
    """Draw all dashboards from a running Prometheus."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", default="http://localhost:9090", help="Its address.")
    parser.add_argument("--range", type=int, default=3600, help="Seconds to look back.")
    parser.add_argument("--rate-interval", type=int, default=60, help="Seconds of a rate.")
    parser.add_argument("--out", type=Path, default=Path(), help="Folder of the pictures.")
    args = parser.parse_args()

    def ask(expression: str) -> list[dict[str, Any]]:
        url = f"{args.prometheus}/api/v1/query"
        answer = httpx.get(url, params={"query": expression}, timeout=60.0)
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    args.out.mkdir(parents=True, exist_ok=True)
    for name in BOARDS:
        path = args.out / f"{name}.png"
        draw(name, ask, path, range_s=args.range, rate_interval_s=args.rate_interval)
        print(path)


if __name__ == "__main__":
    main()
