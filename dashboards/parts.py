"""What the dashboards are made of beside panels: variables, links and queries.

Source: grafana-foundation-sdk for Grafana 10.1 and later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
OURS = 'model_name=~"$model", instance=~"$instance"'
"""Selects the series of the chosen models and instances."""
ONE_MODEL = 'model_name="$one_model", instance=~"$instance"'
"""Selects those of one model: experts of several have nothing but their numbers in common."""
LAYER = f'{ONE_MODEL}, layer=~"$layer"'
ONE_LAYER = f'{ONE_MODEL}, layer="$one_layer"'
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
        .tooltip(DashboardCursorSync.CROSSHAIR)
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


def expert_variables() -> Iterator[dashboard.QueryVariable]:
    """Yield variables: the model of the experts, their layers, and what shows a single layer."""
    yield (
        _one_label("one_model", "Model of the experts", f"moescope_experts{{{OURS}}}", "model_name")
        .sort(VariableSort.ALPHABETICAL_ASC)
    )  # fmt: skip
    values = f"moescope_layer_active_experts{{{ONE_MODEL}}}"
    yield _labels("layer", "Layers", values, "layer").sort(VariableSort.NUMERICAL_ASC)
    yield (
        _one_label("one_layer", "Layer of the expert map", values, "layer")
        .sort(VariableSort.NUMERICAL_ASC)
    )  # fmt: skip


def _one_label(name: str, label: str, selector: str, of: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(f"label_values({selector}, {of})")
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .hide(VariableHide.DONT_HIDE)
        .multi(False)
        .include_all(False)
    )


def _labels(name: str, label: str, selector: str, of: str) -> dashboard.QueryVariable:
    everything = VariableOption(selected=True, text="All", value="$__all")
    return (
        _one_label(name, label, selector, of)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(everything)
    )


def query(expr: str, legend: str = "", *, instant: bool = False) -> prometheus.Dataquery:
    """Return a query; instant ones answer tables with one row a series."""
    made = prometheus.Dataquery().expr(expr).legend_format(legend).datasource(SOURCE)
    if instant:
        return made.instant().format(PromQueryFormat.TABLE)
    return made.range()


def add(to: dashboard.Dashboard, panels: Iterable[Any], heading: str = "") -> dashboard.Dashboard:
    """Return a dashboard with more panels, under a heading if there is one."""
    made = to.with_row(dashboard.Row(heading)) if heading else to
    for panel in panels:
        made = made.with_panel(panel)
    return made
