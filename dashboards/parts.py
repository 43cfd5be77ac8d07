"""What the dashboards are made of: variables, queries, and one function a kind of panel.

Source: grafana-foundation-sdk for Grafana 10.1 and later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table
from grafana_foundation_sdk.builders import timeseries as series
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
OURS = 'model_name=~"$model", instance=~"$instance"'
"""Selects the series of the chosen models and instances."""
LAYER = f'{OURS}, layer=~"$layer"'
TAG = "moescope"


def board(uid: str, title: str, description: str) -> dashboard.Dashboard:
    """Return an empty dashboard with the variables and links that all share."""
    return (
        dashboard.Dashboard(f"moescope / {title}")
        .uid(uid)
        .description(description)
        .tags([TAG])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .readonly()
        .link(
            dashboard.DashboardLink("moescope")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .keep_time(True)
            .include_vars(True)
        )
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(_labels("model", "Model", "moescope_experts", "model_name"))
        .with_variable(
            _labels("instance", "Instance", 'moescope_experts{model_name=~"$model"}', "instance")
        )
    )


def layer_variable() -> dashboard.QueryVariable:
    """Return the variable that chooses layers."""
    return _labels("layer", "Layer", f"moescope_layer_active_experts{{{OURS}}}", "layer").sort(
        VariableSort.NUMERICAL_ASC
    )


def _labels(name: str, label: str, selector: str, of: str) -> dashboard.QueryVariable:
    everything = VariableOption(selected=True, text="All", value="$__all")
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(f"label_values({selector}, {of})")
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(everything)
        .hide(VariableHide.DONT_HIDE)
    )


def query(expr: str, legend: str = "", *, instant: bool = False) -> prometheus.Dataquery:
    """Return a query; instant ones answer tables with one row a series."""
    made = prometheus.Dataquery().expr(expr).legend_format(legend).datasource(SOURCE)
    if instant:
        return made.instant().format(PromQueryFormat.TABLE)
    return made.range()


def _with_queries(panel: Any, queries: list[prometheus.Dataquery]) -> Any:  # noqa: ANN401
    for number, one in enumerate(queries):
        panel = panel.with_target(one.ref_id("ABCDEFGH"[number]))
    return panel


def number(title: str, description: str, unit: str, *queries: prometheus.Dataquery) -> stat.Panel:
    """Return a panel with the latest values, 4 columns wide."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .span(4)
        .height(4)
    )
    made: stat.Panel = _with_queries(panel, list(queries))
    return made


def lines(
    title: str, description: str, unit: str, *queries: prometheus.Dataquery, span: int = 12
) -> series.Panel:
    """Return a panel with lines over time."""
    panel = (
        series.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .fill_opacity(8)
        .show_points(models.VisibilityMode.NEVER)
        .tooltip(
            common.VizTooltipOptions()
            .mode(models.TooltipDisplayMode.MULTI)
            .sort(models.SortOrder.DESCENDING)
        )
        .span(span)
        .height(8)
    )
    made: series.Panel = _with_queries(panel, list(queries))
    return made


def cells(title: str, description: str, unit: str, one: prometheus.Dataquery) -> heatmap.Panel:
    """Return a heatmap over time with a row a series."""
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Viridis").steps(64)
        )
        .filter_values(heatmap.FilterValueRange().le(-1))  # by default zeros are hidden
        .cell_gap(0)
        .unit(unit)
        .span(24)
        .height(12)
        .with_target(one.ref_id("A"))
    )


def rows(title: str, description: str, unit: str, one: prometheus.Dataquery) -> table.Panel:
    """Return a table of the query's series as they are now."""
    return (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(6)
        .height(10)
        .with_target(one.ref_id("A"))
    )


def add(to: dashboard.Dashboard, panels: Iterable[Any], heading: str = "") -> dashboard.Dashboard:
    """Return a dashboard with more panels, under a heading if there is one."""
    made = to.with_row(dashboard.Row(heading)) if heading else to
    for panel in panels:
        made = made.with_panel(panel)
    return made
