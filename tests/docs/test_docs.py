"""The documentation is that of the code: everything is in its table, once, and nothing else is."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import re
import warnings
from argparse import Namespace
from collections import Counter

import pytest
import typer
import yaml
from fastapi import FastAPI
from fastapi.routing import APIRoute

import moescope
from moescope.cli import app
from moescope.servers import stock_command
from moescope_service.capture.routing_replay import ROUTING_METHODS
from moescope_service.causes import MISSING_CAUSES
from moescope_service.metric_names import METRICS
from moescope_service.settings import Settings, flag, variable
from moescope_service.vllm_contract.versions import EVIDENCE
from tests.versions import evidence

from .pages import DOCS, PAGES, ROOT, TEXTS, anchors, code, prose, rows, section

OAITRITON = "OAITritonMxfp4ExpertsMonolithic"  # selects with another kernel's function
COMMANDS = typer.main.get_command(app).commands


def first_cells(page: str, anchor: str) -> list[str]:
    """Return the names in the first column of a section's tables."""
    return [name for cells in rows(section(DOCS / page, anchor)) for name in code(cells[0])]


def everywhere(pattern: str) -> Counter[str]:
    """Count the first cells of all pages' tables that match a pattern."""
    cells = [name for path in PAGES for cells in rows(prose(path)) for name in code(cells[0])]
    return Counter(name for name in cells if re.fullmatch(pattern, name))


def test_every_flag_and_its_variable_and_default():
    table = {cells[0]: cells for cells in rows(section(DOCS / "serving.md", "flags-and-variables"))}
    fields = {f"`{flag(field.metadata['name'])}`": field for field in dataclasses.fields(Settings)}
    assert table.keys() == fields.keys()
    for name, field in fields.items():
        _, variables, default, _ = table[name]
        assert code(variables)[0] == variable(field.metadata["name"])
        (told,) = re.findall(r"\(default: (.+)\)$", field.metadata["help"])
        assert default.strip("`") == told
    assert everywhere("--routes-.+") == Counter(
        flag(field.metadata["name"]) for field in fields.values()
    )


def test_the_versions_that_were_tested():
    runs = json.loads(EVIDENCE.read_text())
    assert evidence.table(runs) in (DOCS / "new-vllm.md").read_text()


@pytest.fixture(scope="module")
def endpoints() -> dict[str, APIRoute]:
    """The endpoints that the plugin adds to an app, by method and path."""
    (point,) = importlib.metadata.entry_points(group="vllm.endpoint_plugins", name="moescope")
    served = FastAPI()
    served.state.args = Namespace(api_key=None)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # torch's and vLLM's own, at their import
        patch.setenv("MOESCOPE_ENABLE", "1")
        point.load()().attach_router(served)
    return {
        f"{method} {route.path.replace(':path', '')}": route
        for route in served.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods
    }


def parameters(route: APIRoute) -> set[str]:
    """Return the names of a route's query parameters, and of its body's fields."""
    dependant = route.dependant
    names = {param.alias for param in dependant.query_params}
    for body in dependant.body_params:
        names |= body.field_info.annotation.model_fields.keys()
    return names


def test_every_endpoint_with_its_parameters(endpoints):
    table = {code(cells[0])[0]: cells[1] for cells in rows(section(DOCS / "api.md", "endpoints"))}
    assert table.keys() == endpoints.keys()
    assert everywhere("(GET|POST|DELETE) .+") == Counter(list(endpoints))
    for name, route in endpoints.items():
        names = parameters(route)
        for anchor in re.findall(r"\(#([\w-]+)\)", table[name])[:1]:
            assert set(first_cells("api.md", anchor)) == names, name
        assert not names or "(#" in table[name], name


def test_every_metric_with_its_labels():
    table = rows(section(DOCS / "metrics.md", "metrics"))
    documented = {code(cells[0])[0]: tuple(code(cells[1])) for cells in table}
    assert documented == {spec.sample_name: spec.labels for spec in METRICS.values()}
    assert set(everywhere("moescope_[a-z_]+(_total)?").values()) == {1}


def headings_under(page: str, anchor: str) -> list[str]:
    """Return the headings within a section."""
    return re.findall(r"^### (.+)$", section(DOCS / page, anchor), re.MULTILINE)


def test_every_cause_of_a_missing_row_is_explained():
    assert sorted(headings_under("metrics.md", "why-rows-are-missing")) == sorted(MISSING_CAUSES)


def test_every_routing_method_of_kernels_that_route_inside():
    names = first_cells("serving.md", "kernels-that-route-inside")
    assert Counter(names) == Counter([OAITRITON, *ROUTING_METHODS])


def test_every_alert_has_an_entry_in_the_runbook():
    groups = yaml.safe_load((ROOT / "dashboards/rules/moescope.yml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert headings_under("metrics.md", "runbook") == alerts


def test_every_command():
    assert everywhere("moescope [a-z]+") == Counter(f"moescope {name}" for name in COMMANDS)


def shown(option: typer.core.TyperOption) -> str:
    """Return an option's default as the tables write it."""
    if option.required:
        return "required"
    if option.secondary_opts and option.default is not None:
        return (option.opts if option.default else option.secondary_opts)[0]
    if option.default is None or (option.is_flag and not option.secondary_opts):
        return ""
    if isinstance(option.default, tuple):
        return " ".join(map(str, option.default))
    return str(option.default)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"serve"}))
def test_every_option_of_every_command_and_its_default(name):
    options = [one for one in COMMANDS[name].params if one.param_type_name == "option"]
    table = rows(section(DOCS / "cli.md", f"moescope-{name}"))
    documented = [(code(cells[0]), cells[1]) for cells in table]
    assert [names for names, _ in documented] == [[*o.opts, *o.secondary_opts] for o in options]
    for (names, default), option in zip(documented, options, strict=True):
        if names != ["--arm"]:  # its default is a list, which its help tells
            assert default.strip("`") == shown(option), names


def test_every_public_name_of_the_client():
    told = set(code((DOCS / "api.md").read_text()))
    assert set(moescope.__all__) <= told
    methods = [name for name in vars(moescope.Client) if not name.startswith("_")]
    cells = first_cells("api.md", "python-client")
    assert {cell.partition("(")[0] for cell in cells if "(" in cell} == set(methods)
    for cell in cells:
        name, called, inside = cell.partition("(")
        if called:
            known = set(inspect.signature(getattr(moescope.Client, name)).parameters) - {"self"}
            assert {one.strip(" =") for one in inside.strip(")").split(",") if one} == known


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in LINK.findall(prose(path)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if path in PAGES:  # the site has nothing else
            assert there.is_relative_to(DOCS), target
        if anchor:
            assert anchor in anchors(there), target


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_anchors_are_one_heading_s(path):
    assert set(Counter(anchors(path)).values()) <= {1}


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = [page for entry in nav for page in entry.values()]
    assert sorted(named) == sorted(str(path.relative_to(DOCS)) for path in PAGES)


def test_every_page_is_in_the_contents():
    contents = {target.partition("#")[0] for target in LINK.findall(prose(DOCS / "README.md"))}
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} == contents


TOP = r"\.ci|benchmarks|client|dashboards|docker|docs|requirements|service|tests"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_of_the_repository_are_there(path):
    for name in code(prose(path)):
        if re.fullmatch(rf"(?:{TOP})/[\w./-]*", name):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_are_there(path):
    targets = set(re.findall(r"^([a-z0-9-]+):[^=]", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|\$ )make ([a-z0-9-]+)", path.read_text())) <= targets


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_to_run_are_there(path):
    for name in re.findall(r"python -m ([\w.]+)", path.read_text()):
        inside = name.replace(".", "/")
        places = [ROOT, ROOT / "client", ROOT / "service"]
        files = [there for place in places for there in (f"{inside}.py", f"{inside}/__main__.py")
                 if (place / there).exists()]  # fmt: skip
        assert name in ("pytest", *stock_command([])) or files, name
