"""The committed JSON is what the code makes, and every metric has its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dashboards import build
from moescope_service.metric_names import METRICS

from .test_rules import rules

ROOT = Path(__file__).parents[2]


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that show something, those of folded rows included."""
    found = [*board["panels"], *(p for row in board["panels"] for p in row.get("panels") or [])]
    return [panel for panel in found if panel["type"] != "row"]


@pytest.fixture(params=build.BOARDS)
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((build.GENERATED / f"{request.param}.json").read_text())
    return loaded


@pytest.mark.parametrize("name", build.BOARDS)
def test_the_committed_json_is_the_generated_one(name: str) -> None:
    """`make dashboards` writes it."""
    assert (build.GENERATED / f"{name}.json").read_text() == build.render(name)


def test_every_panel_says_how_to_read_it(board: dict[str, Any]) -> None:
    titles = [panel["title"] for panel in panels(board)]
    assert len(titles) == len(set(titles)) > 5
    for panel in panels(board):
        assert len(panel["description"]) > 15, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"]


def test_no_data_source_is_fixed(board: dict[str, Any]) -> None:
    (variable,) = [v for v in board["templating"]["list"] if v["name"] == "datasource"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    used = {
        target["datasource"]["uid"] for panel in panels(board) for target in panel["targets"]
    } | {panel["datasource"]["uid"] for panel in panels(board)}
    assert used == {"${datasource}"}


def test_uids_are_their_own_and_the_boards_are_linked() -> None:
    loaded = [json.loads((build.GENERATED / f"{name}.json").read_text()) for name in build.BOARDS]
    assert len({one["uid"] for one in loaded}) == len(loaded)
    for one in loaded:
        (link,) = one["links"]
        assert set(link["tags"]) <= set(one["tags"])


def test_every_metric_of_ours_is_shown_somewhere_and_no_other() -> None:
    expressions = [
        target["expr"]
        for name in build.BOARDS
        for panel in panels(json.loads((build.GENERATED / f"{name}.json").read_text()))
        for target in panel["targets"]
    ]
    expressions += [rule["expr"] for rule in rules()]
    used = set(re.findall(r"\bmoescope_\w+", " ".join(expressions)))
    assert {re.sub("_(total|bucket|sum|count)$", "", name) for name in used} == set(METRICS)


def test_a_big_model_is_shown_without_a_series_an_expert() -> None:
    for name, board in ((name, json.loads((build.GENERATED / f"{name}.json").read_text()))
                        for name in ("overview", "experts", "serving")):  # fmt: skip
        titles = [panel["title"] for panel in board["panels"]]
        end = titles.index("Every expert") if name == "experts" else len(titles)
        shown = json.dumps(board["panels"][:end])
        assert end > 5
        assert "moescope_expert_tokens" not in shown
