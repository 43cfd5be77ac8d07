"""Panels can be read: legends, units, colors, columns. Grafana's types allow all that they hold."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from dashboards import build

from . import schema
from .test_generated import panels

BOARDS = {name: json.loads((build.GENERATED / f"{name}.json").read_text()) for name in build.BOARDS}
ALL = [(name, panel) for name, board in BOARDS.items() for panel in panels(board)]
SWITCHES = ("moescope_collector_up", "moescope_capture_on")
"""Metrics that are 0 or 1."""


def each(kind: str = "") -> Callable[[Any], Any]:
    """Run a test for every panel of a kind."""
    chosen = [(name, panel) for name, panel in ALL if kind in ("", panel["type"])]
    ids = [f"{name}-{panel['title']}" for name, panel in chosen]
    return pytest.mark.parametrize("panel", [panel for _, panel in chosen], ids=ids)


def fields(panel: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = panel["fieldConfig"]["defaults"]
    return found


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def grouped_by(expression: str) -> list[str]:
    """Return the labels that the outermost aggregation keeps; none of a quotient's divisor."""
    found = re.match(r"(?:sum|avg|max|min) by \(([^)]*)\)", expression)
    return found[1].split(", ") if found else []


@each("timeseries")
def test_lines_have_a_legend_with_values(panel: dict[str, Any]) -> None:
    legend, tooltip = panel["options"]["legend"], panel["options"]["tooltip"]
    assert legend["showLegend"]
    assert legend["displayMode"] == "table"
    assert "lastNotNull" in legend["calcs"]
    assert len(legend["calcs"]) >= 2
    assert tooltip["mode"] == "multi"


@each("timeseries")
def test_lines_of_a_panel_have_one_unit_and_different_names(panel: dict[str, Any]) -> None:
    names = [target["legendFormat"] for target in panel["targets"]]
    assert all(names)
    assert len(names) == len(set(names))
    kinds = set()
    for expression in expressions(panel):
        is_rate = "rate(" in expression and " / " not in expression
        is_rate &= "histogram_quantile" not in expression
        kinds.add("rate" if is_rate else "increase" if "increase(" in expression else "value")
    assert len(kinds) == 1
    assert (kinds == {"rate"}) == (fields(panel)["unit"].endswith(("/s", "ps")))
    assert len({"_bytes" in expression for expression in expressions(panel)}) == 1


@each()
def test_legends_name_the_labels_that_tell_series_apart(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        if target.get("format") != "table":
            labels = {"le"} ^ {*grouped_by(target["expr"]), "le"}
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert named == labels, target["expr"]


@each("heatmap")
def test_heatmaps_say_what_a_cell_is(panel: dict[str, Any]) -> None:
    options = panel["options"]
    assert options["tooltip"]["show"]
    assert options["legend"]["show"]
    assert options["yAxis"]["axisLabel"]
    assert options["cellValues"]["unit"]
    (target,) = panel["targets"]
    assert re.fullmatch(r"{{\w+}}", target["legendFormat"]), "only bare numbers are sorted"


@each("stat")
def test_numbers_are_colored_and_switches_are_words(panel: dict[str, Any]) -> None:
    mappings = fields(panel).get("mappings") or []
    if any(name in expression for name in SWITCHES for expression in expressions(panel)):
        (mapping,) = mappings
        assert mapping["options"].keys() == {"0", "1"}
        assert all(one["text"] and one["color"] for one in mapping["options"].values())
        assert len({one["color"] for one in mapping["options"].values()}) == 2
    elif len(panel["targets"]) == 1:
        assert len(fields(panel)["thresholds"]["steps"]) >= 2
    else:
        assert panel["options"]["textMode"] == "value_and_name"
        assert all(target["legendFormat"] for target in panel["targets"])


def test_every_switch_is_shown_as_words() -> None:
    shown = " ".join(e for _, panel in ALL if panel["type"] == "stat" for e in expressions(panel))
    assert all(name in shown for name in SWITCHES)


@each("table")
def test_tables_are_joined_named_and_sorted(panel: dict[str, Any]) -> None:
    steps = {step["id"]: step["options"] for step in panel["transformations"]}
    assert "merge" in steps
    names, hidden = steps["organize"]["renameByName"], steps["organize"]["excludeByName"]
    values = {f"Value #{target['refId']}" for target in panel["targets"]}
    labels = {label for e in expressions(panel) for label in re.findall(r"by \(([^)]*)\)", e)[:1]}
    columns = {*values, *(one for label in labels for one in label.split(", "))}
    assert len(values) >= 2
    assert columns <= names.keys()
    assert hidden == {"Time": True}
    assert steps["organize"]["indexByName"].keys() == names.keys()
    (order,) = panel["options"]["sortBy"]
    assert order["displayName"] in names.values()
    styled = {one["matcher"]["options"] for one in panel["fieldConfig"]["overrides"]}
    assert styled <= set(names.values())
    for value in values:
        assert names[value] in styled, "no unit"


@each()
def test_every_panel_has_a_unit(panel: dict[str, Any]) -> None:
    assert fields(panel)["unit"] not in ("", "short")


def test_rows_captured_are_those_of_the_time_shown() -> None:
    (panel,) = [panel for _, panel in ALL if panel["title"] == "Rows captured"]
    (expression,) = expressions(panel)
    assert expression.count("[$__range]") == expression.count("moescope_trace_rows_total") == 2


def test_selections_by_expert_are_of_one_layer() -> None:
    (panel,) = [panel for _, panel in ALL if panel["title"] == "Selections by expert"]
    assert 'layer="$one_layer"' in expressions(panel)[0]


def test_experts_are_of_one_model() -> None:
    for panel in panels(BOARDS["experts"]):
        for expression in expressions(panel):
            assert expression.count("moescope_") == expression.count('model_name="$one_model"') > 0


@each()
def test_every_series_is_of_the_chosen_servers(panel: dict[str, Any]) -> None:
    for expression in expressions(panel):
        series = re.findall(r"\b((?:moescope|vllm)[_:]\w+)({[^}]*})?", expression)
        assert series
        for name, labels in series:
            assert 'instance=~"$instance"' in labels, name
            if name != "moescope_collector_up":  # is there without a model, too
                assert re.search(r'model_name=(~"\$model"|"\$one_model")', labels), name


def test_what_shows_one_thing_has_a_variable_of_one_value() -> None:
    variables = {one["name"]: one for one in BOARDS["experts"]["templating"]["list"]}
    for name in ("one_model", "one_layer"):
        assert not variables[name]["multi"]
        assert not variables[name]["includeAll"]


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fill_the_grid_without_overlap(name: str) -> None:
    taken = set()
    for panel in BOARDS[name]["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


@pytest.mark.parametrize("name", BOARDS)
def test_grafanas_types_allow_it(name: str) -> None:
    assert schema.faults(BOARDS[name]) == []


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("schemaVersions",), 1, "unknown field"),
        (("panels", 0, "type"), "statt", "is no plugin"),
        (("panels", 0, "gridPos", "h"), "4", "is no"),
        (("panels", 0, "options", "legends"), {}, "unknown field"),
        (("panels", 0, "targets", 0, "expression"), "1", "unknown field"),
        (("panels", 0, "fieldConfig", "defaults", "color", "mode"), "rainbow", "is none of"),
        (("templating", "list", 0, "multi"), "yes", "is no"),
        (("links", 0, "type"), "dashboard", "is none of"),
    ],
)
def test_a_fault_is_found(path: tuple[Any, ...], value: Any, fault: str) -> None:
    board = copy.deepcopy(BOARDS["serving"])
    *parents, last = path
    place = board
    for parent in parents:
        place = place[parent]
    place[last] = value
    assert [one for one in schema.faults(board) if fault in one]
