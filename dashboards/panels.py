"""One function a kind of panel: numbers, lines over time, maps and tables.

Every one says what it shows: a unit, a legend with values, a tooltip, and colors where a value is
good or bad. Source: grafana-foundation-sdk for Grafana 10.1 and later; Grafana's "best practices
for creating dashboards".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import timeseries as series
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models.dashboard import (
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode

from dashboards.parts import SOURCE

GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"
Steps = Sequence[tuple[float | None, str]]
"""From which value on a color holds; the first one from None on."""
PLAIN: Steps = ((None, BLUE),)


def thresholds(steps: Steps) -> dashboards.ThresholdsConfig:
    """Return thresholds in the values' own unit."""
    made = [Threshold(value=value, color=color) for value, color in steps]
    return dashboards.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(made)


def _described(panel: Any, title: str, description: str, unit: str) -> Any:  # noqa: ANN401
    return panel.title(title).description(description).datasource(SOURCE).unit(unit)


def _with_queries(panel: Any, queries: Sequence[prometheus.Dataquery]) -> Any:  # noqa: ANN401
    for number, one in enumerate(queries):
        panel = panel.with_target(one.ref_id("ABCDEFGH"[number]))
    return panel


def number(
    title: str,
    description: str,
    unit: str,
    *queries: prometheus.Dataquery,
    steps: Steps = PLAIN,
    words: Mapping[str, tuple[str, str]] | None = None,
) -> stat.Panel:
    """Return a panel with the latest values, 4 columns wide.

    Args:
        title: Its title.
        description: How to read it.
        unit: Grafana's name of the unit.
        queries: One, or several whose names are shown beside their values.
        steps: Colors by value.
        words: Text and color in the place of a value.
    """
    several = models.BigValueTextMode.VALUE_AND_NAME
    panel = (
        _described(stat.Panel(), title, description, unit)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_scheme(dashboards.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .thresholds(thresholds(steps))
        .color_mode(
            models.BigValueColorMode.VALUE if steps is PLAIN and not words
            else models.BigValueColorMode.BACKGROUND
        )
        .graph_mode(models.BigValueGraphMode.NONE)
        .text_mode(models.BigValueTextMode.VALUE if len(queries) == 1 else several)
        .no_value("no data")
        .span(4)
        .height(4)
    )  # fmt: skip
    if words:
        results = {
            value: ValueMappingResult(text=text, color=color, index=place)
            for place, (value, (text, color)) in enumerate(words.items())
        }
        panel = panel.mappings([ValueMap(results)])
    made: stat.Panel = _with_queries(panel, queries)
    return made


@dataclasses.dataclass(frozen=True)
class Axis:
    """The axis of a panel with lines, and what its legend tells of every line, worst first."""

    unit: str
    least: float | None = 0
    most: float | None = None
    calcs: tuple[str, ...] = ("lastNotNull", "max")
    decimals: int | None = None
    limit: Steps | None = None
    """Thresholds drawn as lines: those of an alert."""


def lines(
    title: str,
    description: str,
    axis: Axis,
    *queries: prometheus.Dataquery,
    many: bool = False,
    span: int = 12,
) -> series.Panel:
    """Return a panel with lines over time.

    Args:
        title: Its title.
        description: How to read it.
        axis: The one axis of all lines.
        queries: Each with a name for its lines.
        many: Whether there may be dozens of lines: the legend stands at the right.
        span: Columns of 24.
    """
    is_low = "min" in axis.calcs
    legend = (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(models.LegendDisplayMode.TABLE)
        .placement(models.LegendPlacement.RIGHT if many else models.LegendPlacement.BOTTOM)
        .calcs(list(axis.calcs))
        .sort_by("Min" if is_low else "Max")
        .sort_desc(not is_low)
    )
    panel = (
        _described(series.Panel(), title, description, axis.unit)
        .color_scheme(dashboards.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC))
        .line_width(1)
        .fill_opacity(0 if many or len(queries) > 1 else 10)
        .show_points(models.VisibilityMode.NEVER)
        .legend(legend)
        .tooltip(
            common.VizTooltipOptions()
            .mode(models.TooltipDisplayMode.MULTI)
            .sort(models.SortOrder.DESCENDING)
        )
        .span(span)
        .height(9)
    )
    if axis.least is not None:
        panel = panel.min(axis.least)
    if axis.most is not None:
        panel = panel.max(axis.most)
    if axis.decimals is not None:
        panel = panel.decimals(axis.decimals)
    if axis.limit is not None:
        dashed = common.GraphThresholdsStyleConfig().mode(models.GraphTresholdsStyleMode.DASHED)
        panel = panel.thresholds(thresholds(axis.limit)).thresholds_style(dashed)
    made: series.Panel = _with_queries(panel, queries)
    return made


def cells(
    title: str, description: str, unit: str, rows_are: str, one: prometheus.Dataquery
) -> heatmap.Panel:
    """Return a heatmap over time with a row a series, named by a bare number.

    Grafana sorts rows by number only where all names are numbers.
    """
    panel = (
        _described(heatmap.Panel(), title, description, unit)
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME).scheme("Viridis").steps(64).min(0)
        )
        .filter_values(heatmap.FilterValueRange().le(-1))  # by default zeros are hidden
        .rows_frame(
            heatmap.RowsHeatmapOptions().layout(models.HeatmapCellLayout.UNKNOWN).value(title)
        )
        .y_axis(
            heatmap.YAxisConfig().axis_label(rows_are).unit("none").decimals(0)
            .axis_placement(models.AxisPlacement.LEFT)
        )
        .cell_values(heatmap.CellValues().unit(unit))
        .cell_gap(0)
        .show_legend()
        .show_tooltip()
        .span(24)
        .height(12)
    )  # fmt: skip
    made: heatmap.Panel = panel.with_target(one.ref_id("A"))
    return made


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table: a label, or the value of a query."""

    name: str
    unit: str = "none"
    bar: bool = False
    """Whether a bar is drawn behind the value."""
    decimals: int | None = None

    def override(self) -> list[DynamicConfigValue]:
        """Return Grafana's settings of this column alone."""
        found = [DynamicConfigValue(id_val="unit", value=self.unit)]
        if self.decimals is not None:
            found.append(DynamicConfigValue(id_val="decimals", value=self.decimals))
        if self.bar:
            cell = {"type": "gauge", "mode": "basic"}
            found.append(DynamicConfigValue(id_val="custom.cellOptions", value=cell))
            found.append(DynamicConfigValue(id_val="min", value=0))
        return found


def rows(
    title: str,
    description: str,
    columns: Mapping[str, Column],
    order: str,
    *queries: prometheus.Dataquery,
    span: int = 12,
) -> table.Panel:
    """Return a table of several queries' series as they are now, joined by their labels.

    Args:
        title: Its title.
        description: How to read it.
        columns: Columns from left to right: by label, or by ``Value #A`` for the first query.
        order: Name of the column that sorts the rows, the highest first; with ``-`` the lowest.
        queries: Instant ones.
        span: Columns of 24.
    """
    sort = common.TableSortByFieldState().display_name(order.removeprefix("-"))
    sort = sort.desc(not order.startswith("-"))
    organize = {
        "excludeByName": {"Time": True},
        "indexByName": {field: place for place, field in enumerate(columns)},
        "renameByName": {field: column.name for field, column in columns.items()},
    }
    panel = (
        _described(table.Panel(), title, description, "none")
        .color_scheme(dashboards.FieldColor().mode(FieldColorModeId.CONTINUOUS_BLUES))
        .with_transformation(DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(DataTransformerConfig(id_val="organize", options=organize))
        .sort_by([sort])
        .show_header(True)
        .span(span)
        .height(9)
    )
    for column in columns.values():
        panel = panel.override_by_name(column.name, column.override())
    made: table.Panel = _with_queries(panel, queries)
    return made
