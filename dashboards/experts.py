"""Experts: which ones do the work, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import Axis, Column, cells, lines, rows
from dashboards.parts import LAYER, ONE_LAYER, ONE_MODEL, add, board, expert_variables, query

TOP = 20
"""Rows of a table of experts."""


def build() -> Dashboard:
    """Return the dashboard."""
    made = board(
        "moescope-experts",
        "Experts",
        "Load of the experts of one model by layer. The first group is there for every model; the "
        "second needs a series an expert: up to 2,000 layers x experts, or --routes-expert-metrics "
        "on.",
    )
    for variable in expert_variables():
        made = made.with_variable(variable)
    return add(add(made, _by_layer()), _by_expert(), "Every expert")


def _by_layer() -> Iterator[Any]:
    yield cells(
        "MaxVio by layer", "A row a layer, decode. Bright: one expert carries much more than the "
        "mean.", "none", "layer",
        query(f'max by (layer) (moescope_layer_max_violation{{{LAYER}, phase="decode"}})',
              "{{layer}}"),
    )  # fmt: skip
    low = Axis("percentunit", least=None, most=1, calcs=("lastNotNull", "min"))
    for title, name, description, axis in (
        ("Normalized entropy", "normalized_entropy",
         "Entropy over its maximum, log2(experts) bits; 100% is even.", low),
        ("MaxVio", "max_violation", "The busiest expert's load over the mean, less one.",
         Axis("none")),
        ("Busiest over mean", "max_mean_load_ratio", "The busiest expert's load over the mean.",
         Axis("suffix:x")),
        ("Active experts", "active_experts", "Experts that were selected at all.",
         Axis("count:experts", calcs=("lastNotNull", "min"), decimals=0)),
    ):  # fmt: skip
        yield lines(
            title, f"{description} By layer and phase, the worst first.", axis,
            query(f"avg by (layer, phase) (moescope_layer_{name}{{{LAYER}}})",
                  "layer {{layer}}, {{phase}}"), many=True,
        )  # fmt: skip
    yield _extremes()
    yield lines(
        "Prefill against decode", "Mean normalized entropy over all layers: prompts and answers "
        "use experts differently.", low,
        query(f"avg by (phase) (moescope_layer_normalized_entropy{{{ONE_MODEL}}})", "{{phase}}"),
    )  # fmt: skip


def _extremes() -> Any:  # noqa: ANN401
    columns = {"instance": Column("Instance"), "layer": Column("Layer")}
    queries = []
    for number, word in enumerate(("hottest", "coldest")):
        name = f"moescope_layer_{word}_expert"
        for letter, metric in zip("ABCD"[2 * number :], (name, f"{name}_share"), strict=False):
            is_share = metric.endswith("share")
            columns[f"Value #{letter}"] = (
                Column(f"{word.title()}: share", "percentunit", bar=True, decimals=2) if is_share
                else Column(f"{word.title()} expert", decimals=0)
            )  # fmt: skip
            expression = f"max by (instance, layer) ({metric}{{{LAYER}}})"
            queries.append(query(expression, instant=True))
    return rows(
        "Hottest and coldest expert", "Of each layer in the window: the expert's number and its "
        "share of the layer's selections.", columns, "Hottest: share", *queries,
    )  # fmt: skip


def _selections(more: str = "") -> str:
    """Return how often each expert was selected in the time shown."""
    counter = f"moescope_expert_tokens_total{{{LAYER}{more}}}"
    return f"sum by (layer, expert) (increase({counter}[$__range]))"


def _ranking(title: str, description: str, function: str, more: str = "") -> Any:  # noqa: ANN401
    counts = _selections(more)
    chosen = f"{function}({TOP}, {counts})"
    layers = counts.replace("(layer, expert)", "(layer)")
    share = f"{counts} / on (layer) group_left () {layers}"
    columns = {
        "layer": Column("Layer"),
        "expert": Column("Expert"),
        "Value #A": Column("Selections", "locale", decimals=0),
        "Value #B": Column("Share of the layer", "percentunit", bar=True, decimals=2),
    }
    order = "Selections" if function == "topk" else "-Selections"
    return rows(
        title, description, columns, order, query(chosen, instant=True),
        query(f"{share} and on (layer, expert) {chosen}", instant=True),
    )  # fmt: skip


def _by_expert() -> Iterator[Any]:
    yield cells(
        "Selections by expert", "A row an expert of one layer, chosen above. Dark rows are idle "
        "experts.", "count:selections/s", "expert",
        query(f"sum by (expert) (rate(moescope_expert_tokens_total{{{ONE_LAYER}}}"
              "[$__rate_interval]))", "{{expert}}"),
    )  # fmt: skip
    yield _ranking("Hottest experts", "Most selections in the time shown.", "topk")
    yield _ranking("Coldest experts", "Fewest selections in the time shown.", "bottomk")
    for phase, tokens in (("prefill", "tokens of prompts"), ("decode", "generated tokens")):
        yield _ranking(f"{phase.title()} experts", f"Most selections by {tokens}.", "topk",
                       f', phase="{phase}"')  # fmt: skip
