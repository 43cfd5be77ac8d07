"""Every dashboard drawn from its own queries, of an hour of made-up metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from dashboards import build, draw
from dashboards.draw_panels import DRAW, Rect

from . import made_up
from .test_generated import panels

Ask = Callable[[str], list[dict[str, Any]]]
RANGE_S, RATE_INTERVAL_S = 3600, 120
BOARDS = {name: json.loads((build.GENERATED / f"{name}.json").read_text()) for name in build.BOARDS}


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with made_up.prometheus(tmp_path_factory.mktemp("made_up")) as ask:
        yield ask


def shown(ask: Ask, title: str) -> list[dict[str, Any]]:
    """Return the series of a number's first query."""
    (panel,) = [panel for panel in panels(BOARDS["overview"]) if panel["title"] == title]
    return draw.Source(ask, RANGE_S, RATE_INTERVAL_S).now(panel["targets"][0]["expr"])


@pytest.mark.parametrize("name", build.BOARDS)
def test_every_query_finds_something(ask: Ask, name: str) -> None:
    source = draw.Source(ask, RANGE_S, RATE_INTERVAL_S, draw.first_values(BOARDS[name], ask))
    empty = [
        (panel["title"], target["expr"])
        for panel in panels(BOARDS[name])
        for target in panel["targets"]
        if not source.now(target["expr"])
    ]
    assert not empty


@pytest.mark.parametrize("name", build.BOARDS)
def test_a_picture_is_drawn(ask: Ask, name: str, tmp_path) -> None:
    path = tmp_path / f"{name}.png"
    draw.draw(name, ask, path, range_s=RANGE_S, rate_interval_s=RATE_INTERVAL_S)
    with Image.open(path) as picture:
        scale = picture.width / 24
        for panel in panels(BOARDS[name]):
            place = panel["gridPos"]
            bottom = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in BOARDS[name]["panels"])
            row = picture.height / (bottom + draw.HEAD_IN / draw.ROW_IN)
            left, top = place["x"] * scale, picture.height - (bottom - place["y"]) * row
            inside = picture.crop((
                int(left + 0.3 * scale), int(top + 1.6 * row),
                int(left + place["w"] * scale / 2), int(top + place["h"] * row * 0.75),
            ))  # fmt: skip
            assert len(inside.getcolors()) > 2, f"{panel['title']} is blank"
    assert path.stat().st_size < 200_000


def test_a_table_has_blanks_where_a_query_lacks_a_row() -> None:
    """The queries of a panel run one after another, while the values go on."""
    (panel,) = [one for one in panels(BOARDS["experts"]) if one["title"] == "Hottest experts"]

    def ask(expression: str) -> list[dict[str, Any]]:
        experts = {first: "12", second: "23"}[expression]
        return [{"metric": {"layer": "0", "expert": one}, "value": [0, "7"]} for one in experts]

    source = draw.Source(ask, RANGE_S, RATE_INTERVAL_S)
    targets = [{**one, "expr": source.expression(one["expr"])} for one in panel["targets"]]
    panel = {**panel, "targets": targets}
    first, second = (target["expr"] for target in panel["targets"])
    figure = Figure(figsize=(6, 3))
    DRAW["table"](Rect(figure, 0, 0, 6, 3), panel, source)
    assert [text.get_text() for text in figure.texts].count("7") == 2


def test_the_numbers_are_right(ask: Ask) -> None:
    highest = made_up.share(3, 5, 1.0) * made_up.NUM_EXPERTS - 1
    possible = made_up.NUM_EXPERTS / made_up.TOP_K - 1
    for title, expected in (
        ("Collector", 1),
        ("Imbalance", highest / possible),
        ("Most idle experts", 1),
        ("Rows captured", 1 - 20 * 360 / (300 * 3600)),
    ):
        (series,) = shown(ask, title)
        assert float(series["value"][1]) == pytest.approx(expected, rel=2e-3), title


def test_rows_captured_forget_what_was_lost_before(ask: Ask) -> None:
    """In the last 15 minutes nothing was lost, though there was before."""
    (panel,) = [one for one in panels(BOARDS["overview"]) if one["title"] == "Rows captured"]
    (series,) = draw.Source(ask, 900, 120).now(panel["targets"][0]["expr"])
    assert float(series["value"][1]) == pytest.approx(1.0, abs=1e-9)


def test_the_expert_map_has_a_row_an_expert_of_one_layer(ask: Ask) -> None:
    board = BOARDS["experts"]
    variables = draw.first_values(board, ask)
    assert variables == {"one_model": "tiny", "one_layer": "0"}
    (panel,) = [one for one in panels(board) if one["title"] == "Selections by expert"]
    found = draw.Source(ask, 3600, 120, variables).over_time(panel["targets"][0]["expr"])
    assert {int(one["metric"]["expert"]) for one in found} == set(range(made_up.NUM_EXPERTS))
