"""Draws what the Experts dashboard shows, with its own queries, where no Grafana can run.

``python -m dashboards.draw --prometheus http://localhost:9090 --out experts.png``
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from dashboards.experts import SELECTIONS, balance

Ask = Callable[[str], list[dict[str, Any]]]

BALANCE = {
    "Entropy over its maximum": balance("normalized_entropy"),
    "MaxVio": balance("max_violation"),
    "Active experts": balance("active_experts"),
}

TABLES = {"topk": "Hottest experts", "bottomk": "Coldest experts"}


def draw(ask: Ask, path: Path) -> None:
    """Draw selections by layer and expert, and the balance of every layer.

    Args:
        ask: Answers an instant query, with Grafana's variables in it, with the result's series.
        path: The PNG.
    """
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    axes = figure.subplot_mosaic(
        [["map", "map", "map", TABLES["topk"]], [*BALANCE, TABLES["bottomk"]]],
        height_ratios=[1.2, 1.0],
        width_ratios=[1.0, 1.0, 1.0, 0.75],
    )
    _draw_map(figure, axes["map"], ask(SELECTIONS))
    for function, title in TABLES.items():
        _draw_table(axes[title], title, ask(f"{function}(8, {SELECTIONS})"))
    for title, expression in BALANCE.items():
        _draw_layers(axes[title], title, ask(expression))
    figure.suptitle("moescope: experts, as a Prometheus saw them", fontsize=13, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def _draw_map(figure: Figure, axes: Any, found: list[dict[str, Any]]) -> None:  # noqa: ANN401
    layers = sorted({int(one["metric"]["layer"]) for one in found})
    experts = 1 + max(int(one["metric"]["expert"]) for one in found)
    counts = np.zeros((len(layers), experts))
    for one in found:
        row = layers.index(int(one["metric"]["layer"]))
        counts[row, int(one["metric"]["expert"])] = float(one["value"][1])
    load = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)
    image = axes.imshow(load, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0.0)
    axes.set(xlabel="expert", ylabel="layer", title="Load over the layer's mean, all tokens")
    axes.set_yticks(range(len(layers)), layers)
    figure.colorbar(image, ax=axes, pad=0.01)


def _draw_layers(axes: Any, title: str, found: list[dict[str, Any]]) -> None:  # noqa: ANN401
    layers = sorted({int(one["metric"]["layer"]) for one in found})
    for number, phase in enumerate(("prefill", "decode")):
        values = {
            int(one["metric"]["layer"]): float(one["value"][1])
            for one in found
            if one["metric"]["phase"] == phase
        }
        places = np.array([layers.index(layer) for layer in values]) + 0.4 * (number - 0.5)
        color = mpl.colormaps["viridis"](0.25 + 0.45 * number)
        axes.bar(places, list(values.values()), width=0.38, label=phase, color=color)
    axes.set(xlabel="layer", title=title)
    axes.set_xticks(range(len(layers)), layers)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _draw_table(axes: Any, title: str, found: list[dict[str, Any]]) -> None:  # noqa: ANN401
    cells = [
        [one["metric"]["layer"], one["metric"]["expert"], f"{float(one['value'][1]):,.0f}"]
        for one in found
    ]
    axes.set_axis_off()
    axes.set_title(title)
    made = axes.table(cells, colLabels=["layer", "expert", "selections"], loc="upper center")
    made.scale(1.0, 1.35)


def main() -> None:
    """Draw from a running Prometheus."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", default="http://localhost:9090", help="Its address.")
    parser.add_argument("--range", default="1h", help="How far to look back.")
    parser.add_argument("--out", type=Path, default=Path("experts.png"), help="The picture.")
    args = parser.parse_args()

    def ask(expression: str) -> list[dict[str, Any]]:
        query = expression.replace("$__range", args.range)
        query = re.sub(r"\$(model|instance|layer)", ".+", query)
        answer = httpx.get(f"{args.prometheus}/api/v1/query", params={"query": query})
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    draw(ask, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
