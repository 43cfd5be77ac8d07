"""Draws panels of each kind as their JSON configures them: legend, unit, colors, columns."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dashboards.units import written

Panel = Mapping[str, Any]
Series = dict[str, Any]

PALETTE = ("#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#f2495c", "#b877d9", "#37872d", "#e0b400",
           "#1f60c4", "#fa6400", "#c4162a", "#8f3bb8", "#8ab8ff", "#ffa6b0", "#96d98d")  # fmt: skip
NAMED = {"green": "#56a64b", "orange": "#ff9830", "red": "#e02f44", "blue": "#1f60c4"}
CALCS: Mapping[str, tuple[str, Callable[[list[float]], float]]] = {
    "lastNotNull": ("Last *", lambda v: v[-1]),
    "max": ("Max", max),
    "min": ("Min", min),
}
LINE_IN = 0.17
"""Inches of a line of a legend or a row of a table."""


class Source(Protocol):
    """Answers a panel's queries."""

    def now(self, text: str) -> list[Series]:
        """Return series with their latest value."""

    def over_time(self, text: str) -> list[Series]:
        """Return series with their values in the time shown."""


@dataclasses.dataclass(frozen=True)
class Rect:
    """A part of a figure, in inches from its lower left corner."""

    figure: Figure
    x: float
    y: float
    width: float
    height: float

    def _place(
        self, left: float, bottom: float, right: float, top: float
    ) -> tuple[float, float, float, float]:
        wide, high = self.figure.get_size_inches()
        return (
            (self.x + left) / wide,
            (self.y + bottom) / high,
            (self.width - left - right) / wide,
            (self.height - bottom - top) / high,
        )

    def axes(self, left: float, bottom: float, right: float, top: float) -> Any:  # noqa: ANN401
        """Return axes within these margins."""
        return self.figure.add_axes(self._place(left, bottom, right, top))

    def card(self, title: str = "", color: str = "white") -> None:
        """Draw the panel's background and title."""
        self.box(self._place(0.04, 0.04, 0.04, 0.04), facecolor=color, edgecolor="#d8d9da")
        self.text(0.14, self.height - 0.22, title, weight="bold", fontsize=9)

    def bar(self, x: float, y: float, width: float) -> None:
        """Draw a bar behind a table's row, in inches."""
        right, top = self.width - x - width, self.height - y - 0.11
        self.box(self._place(x, y, right, top), zorder=-1, facecolor="#8ab8ff")

    def box(
        self,
        place: tuple[float, float, float, float],
        zorder: int = -2,
        **how: Any,  # noqa: ANN401
    ) -> None:
        """Draw a rectangle below all axes."""
        x, y, width, height = place
        made = Rectangle((x, y), width, height, zorder=zorder, **how)
        made.set_transform(self.figure.transFigure)
        self.figure.add_artist(made)

    def text(self, x: float, y: float, text: str, **how: Any) -> None:  # noqa: ANN401
        """Write at a place in inches."""
        wide, high = self.figure.get_size_inches()
        self.figure.text((self.x + x) / wide, (self.y + y) / high, text, **how)


def _unit(panel: Panel) -> str:
    unit: str = panel["fieldConfig"]["defaults"]["unit"]
    return unit


def _name(target: Mapping[str, Any], series: Series) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: series["metric"].get(found[1], ""),
                  target["legendFormat"])  # fmt: skip


def _values(series: Series) -> tuple[list[datetime], list[float]]:
    times = [datetime.fromtimestamp(float(at), UTC) for at, _ in series["values"]]
    return times, [float(value) for _, value in series["values"]]


def draw_row(rect: Rect, panel: Panel, _source: Source) -> None:
    """Draw a heading."""
    rect.text(0.1, 0.08, f"▾ {panel['title']}", weight="bold", fontsize=10)


def draw_number(rect: Rect, panel: Panel, source: Source) -> None:
    """Draw latest values, as words and in colors where the panel says so."""
    found = [(target["legendFormat"], float(series["value"][1]))
             for target in panel["targets"] for series in source.now(target["expr"])]  # fmt: skip
    fields, options = panel["fieldConfig"]["defaults"], panel["options"]
    texts, color = [], "white"
    for name, value in found:
        text = written(value, fields["unit"])
        steps = fields["thresholds"]["steps"]
        color = [step["color"] for step in steps if (step["value"] or -np.inf) <= value or
                 step["value"] is None][-1]  # fmt: skip
        for mapping in fields.get("mappings") or []:
            word = mapping["options"].get(f"{value:g}")
            text, color = (word["text"], word["color"]) if word else (text, color)
        texts.append((name, text))
    filled = options["colorMode"] == "background" and bool(found)
    rect.card(color=NAMED[color] if filled else "white")
    ink = "white" if filled else "black"
    rect.text(0.14, rect.height - 0.22, panel["title"], weight="bold", fontsize=9, color=ink)
    for place, (name, text) in enumerate(texts or [("", fields["noValue"])]):
        x = rect.width * (place + 0.5) / max(1, len(texts))
        ink = "white" if filled else NAMED.get(color, "black")
        rect.text(x, rect.height * 0.36, text, ha="center", fontsize=17, color=ink)
        if options["textMode"] == "value_and_name":
            rect.text(x, rect.height * 0.16, name, ha="center", fontsize=8)


def draw_lines(rect: Rect, panel: Panel, source: Source) -> None:
    """Draw lines over time with the legend's table of values."""
    rect.card(panel["title"])
    found = [
        (_name(target, series), *_values(series))
        for target in panel["targets"]
        for series in source.over_time(target["expr"])
    ]
    if not found:
        rect.text(rect.width / 2, rect.height / 2, "No data", ha="center")
        return
    legend, fields = panel["options"]["legend"], panel["fieldConfig"]["defaults"]
    is_right = legend["placement"] == "right"
    room = rect.height - 0.6 if is_right else min(1.05, LINE_IN * (len(found) + 1))
    lower = 0.3 if is_right else 0.35 + room
    axes = rect.axes(0.75, lower, rect.width * 0.42 if is_right else 0.2, 0.35)
    ink = {name: PALETTE[i % len(PALETTE)] for i, (name, _, _) in enumerate(found)}
    for name, times, values in found:
        axes.plot(times, values, color=ink[name], linewidth=1.1)
        if fields["custom"]["fillOpacity"] and len(found) == 1:
            axes.fill_between(times, values, color=ink[name], alpha=0.1)
    for step in fields.get("thresholds", {}).get("steps", []):
        if step["color"] in NAMED and step["value"] is not None:
            axes.axhline(step["value"], color=NAMED[step["color"]], linestyle="--", linewidth=1)
    axes.set_ylim(fields.get("min"), fields.get("max"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: written(v, fields["unit"], fields.get("decimals")))
    )
    _tidy(axes)
    _draw_legend(rect, panel, found, ink, room)


def _tidy(axes: Any) -> None:  # noqa: ANN401
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda at, _: datetime.fromtimestamp(at * 86400, UTC).strftime("%H:%M"))
    )
    axes.tick_params(labelsize=7, length=2)
    axes.grid(axis="y", color="#e4e5e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_legend(
    rect: Rect,
    panel: Panel,
    found: list[tuple[str, list[datetime], list[float]]],
    ink: Mapping[str, str],
    room: float,
) -> None:
    legend, unit = panel["options"]["legend"], _unit(panel)
    calcs = [CALCS[name] for name in legend["calcs"]]
    rows = [(name, [reduce(values) for _, reduce in calcs]) for name, _, values in found]
    column = [title for title, _ in calcs].index(legend["sortBy"])
    rows.sort(key=lambda row: row[1][column], reverse=legend["sortDesc"])
    is_right = legend["placement"] == "right"
    left = rect.width * 0.61 if is_right else 0.2
    top = rect.height - 0.4 if is_right else room + 0.02
    ends = [rect.width - 0.2 - 1.0 * i for i in range(len(calcs))][::-1]
    for end, (title, _) in zip(ends, calcs, strict=True):
        rect.text(end, top, title, ha="right", fontsize=7, color="#1f60c4")
    fitting = int(room / LINE_IN) - 1
    for place, (name, values) in enumerate(rows[:fitting], start=1):
        y = top - LINE_IN * place
        rect.text(left, y, "▬", fontsize=7, color=ink[name])
        rect.text(left + 0.17, y, textwrap.shorten(name, 34), fontsize=7)
        for end, value in zip(ends, values, strict=True):
            rect.text(end, y, written(value, unit), ha="right", fontsize=7)
    if len(rows) > fitting:
        rect.text(
            left + 0.17, top, f"{len(rows) - fitting} more to scroll to", fontsize=7, color="gray"
        )


def draw_cells(rect: Rect, panel: Panel, source: Source) -> None:
    """Draw a heatmap with a row a series and its colors' legend."""
    rect.card(panel["title"])
    (target,) = panel["targets"]
    found = sorted(source.over_time(target["expr"]), key=lambda one: float(_name(target, one)))
    if not found:
        rect.text(rect.width / 2, rect.height / 2, "No data", ha="center")
        return
    times = sorted({at for series in found for at, _ in series["values"]})
    column = {at: place for place, at in enumerate(times)}
    values = np.full((len(found), len(times)), np.nan)
    for row, series in enumerate(found):
        for at, value in series["values"]:
            values[row, column[at]] = float(value)
    axes = rect.axes(0.75, 0.35, 0.75, 0.35)
    extent = (float(times[0]) / 86400, float(times[-1]) / 86400, -0.5, len(found) - 0.5)
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="viridis", vmin=0,
                        interpolation="nearest", extent=extent)  # fmt: skip
    _tidy(axes)
    axes.grid(visible=False)
    axes.set_ylabel(panel["options"]["yAxis"]["axisLabel"], fontsize=8)
    marks = range(0, len(found), 1 + len(found) // 12)
    axes.set_yticks(list(marks), [_name(target, found[place]) for place in marks])
    bar = rect.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    unit = panel["options"]["cellValues"]["unit"]
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: written(v, unit)))
    bar.ax.tick_params(labelsize=7)


def draw_table(rect: Rect, panel: Panel, source: Source) -> None:
    """Draw a table after its transformations: joined, named, sorted."""
    rect.card(panel["title"])
    steps = {step["id"]: step["options"] for step in panel["transformations"]}
    places = steps["organize"]["indexByName"]
    renamed = steps["organize"]["renameByName"]
    names = {field: renamed[field] for field in sorted(places, key=places.get)}
    styles = {one["matcher"]["options"]: {p["id"]: p["value"] for p in one["properties"]}
              for one in panel["fieldConfig"]["overrides"]}  # fmt: skip
    rows = _merged(panel["targets"], source)
    (order,) = panel["options"]["sortBy"]
    (key,) = [field for field, name in names.items() if name == order["displayName"]]
    rows.sort(key=lambda row: float(row.get(key, "-inf")), reverse=order["desc"])
    width = (rect.width - 0.3) / len(names)
    highest = {
        field: max((float(row[field]) for row in rows if field in row), default=1.0)
        for field, name in names.items()
        if "custom.cellOptions" in styles[name]
    }
    for column, (field, name) in enumerate(names.items()):
        left, top = 0.15 + column * width, rect.height - 0.45
        rect.text(left, top, name, fontsize=7.5, color="#1f60c4", weight="bold")
        for place, row in enumerate(rows[: int((top - 0.1) / LINE_IN)], start=1):
            if field not in row:  # its query came a moment later, with other rows
                continue
            y, style, text = top - place * LINE_IN, styles[name], str(row[field])
            if field.startswith("Value"):
                text = written(float(text), style["unit"], style.get("decimals"))
            rect.text(left, y, text, fontsize=7.5)
            if field in highest:
                share = float(row[field]) / (highest[field] or 1.0)
                rect.bar(left + 0.5, y, 0.02 + (width - 0.65) * share)


def _merged(targets: Iterable[Mapping[str, Any]], source: Source) -> list[dict[str, str]]:
    """Join the queries' series by their labels."""
    joined: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for target in targets:
        for series in source.now(target["expr"]):
            labels = series["metric"]
            row = joined.setdefault(tuple(sorted(labels.items())), dict(labels))
            row[f"Value #{target['refId']}"] = series["value"][1]
    return list(joined.values())


DRAW: Mapping[str, Callable[[Rect, Panel, Source], None]] = {
    "row": draw_row,
    "stat": draw_number,
    "timeseries": draw_lines,
    "heatmap": draw_cells,
    "table": draw_table,
}
