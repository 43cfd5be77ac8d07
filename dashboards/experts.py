"""Experts: which ones do the work, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.parts import (
    LAYER,
    OURS,
    add,
    board,
    cells,
    layer_variable,
    lines,
    query,
    rows,
)

SELECTIONS = f"sum by (layer, expert) (increase(moescope_expert_tokens_total{{{LAYER}}}[$__range]))"
"""How often each expert was selected in the time shown."""


def balance(name: str) -> str:
    """Return the query of one measure of load balance, by layer and phase."""
    return f"avg by (layer, phase) (moescope_layer_{name}{{{LAYER}}})"


def build() -> Dashboard:
    """Return the dashboard."""
    made = board(
        "moescope-experts",
        "Experts",
        "Load of the experts by layer. The first group is there for every model; the second needs "
        "a series an expert: up to 2,000 layers x experts, or --routes-expert-metrics on.",
    ).with_variable(layer_variable())
    return add(add(made, _by_layer()), _by_expert(), "Every expert")


def _by_layer() -> Iterator[Any]:
    yield cells(
        "MaxVio by layer", "A row a layer, decode. Bright: one expert carries much more than the "
        "mean.", "none",
        query(f'max by (layer) (moescope_layer_max_violation{{{LAYER}, phase="decode"}})',
              "{{layer}}"),
    )  # fmt: skip
    for title, name, description, unit in (
        ("Entropy", "normalized_entropy", "Over its maximum; 1 is even.", "none"),
        ("MaxVio", "max_violation", "The busiest expert's load over the mean, less one.", "none"),
        ("Busiest over mean", "max_mean_load_ratio", "The busiest expert's load over the mean.",
         "none"),
        ("Active experts", "active_experts", "Experts that were selected at all.", "none"),
    ):  # fmt: skip
        expr = balance(name)
        yield lines(title, f"{description} By layer and phase.", unit,
                    query(expr, "layer {{layer}}, {{phase}}"))  # fmt: skip
    for word in ("hottest", "coldest"):
        name = f"moescope_layer_{word}_expert"
        each = "max by (instance, layer)"
        yield rows(f"{word.title()} expert", f"The {word} expert of each layer, by number.",
                   "none", query(f"{each} ({name}{{{LAYER}}})", instant=True))  # fmt: skip
        yield rows(f"Share of the {word}", "Its share of the layer's selections.", "percentunit",
                   query(f"{each} ({name}_share{{{LAYER}}})", instant=True))  # fmt: skip
    yield lines(
        "Prefill against decode", "Mean entropy over all layers: prompts and answers use experts "
        "differently.", "none",
        query(f"avg by (phase) (moescope_layer_normalized_entropy{{{OURS}}})", "{{phase}}"),
        span=24,
    )  # fmt: skip


def _by_expert() -> Iterator[Any]:
    yield cells(
        "Selections by expert", "A row an expert of the chosen layers: choose one layer to read it "
        "alone. Dark rows are idle experts.", "short",
        query("sum by (layer, expert) (rate(moescope_expert_tokens_total"
              f"{{{LAYER}}}[$__rate_interval]))", "layer {{layer}}, expert {{expert}}"),
    )  # fmt: skip
    yield rows("Hottest experts", "Most selections in the time shown.", "short",
               query(f"topk(20, {SELECTIONS})", instant=True))  # fmt: skip
    yield rows("Coldest experts", "Fewest selections in the time shown.", "short",
               query(f"bottomk(20, {SELECTIONS})", instant=True))  # fmt: skip
    yield rows(
        "Prefill experts", "Most selections by tokens of prompts.", "short",
        query("topk(20, sum by (layer, expert) (increase(moescope_expert_tokens_total"
              f'{{{LAYER}, phase="prefill"}}[$__range])))', instant=True),
    )  # fmt: skip
    yield rows(
        "Decode experts", "Most selections by generated tokens.", "short",
        query("topk(20, sum by (layer, expert) (increase(moescope_expert_tokens_total"
              f'{{{LAYER}, phase="decode"}}[$__range])))', instant=True),
    )  # fmt: skip
