"""Every query of every panel and rule against a real Prometheus that scrapes a real server."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashboards import build
from moescope import datasets, replay
from moescope.servers import Server, captured_command
from moescope_service import bundled_model
from tests.e2e.conftest import API_KEY, serving
from tests.e2e.prometheus import Query, prometheus

from .test_generated import RULES, panels, rules

WAIT_S = 90.0
VARIABLES = {
    "$__rate_interval": "10s",
    "$__range": "1m",
    "$model": ".+",
    "$instance": ".+",
    "$layer": ".+",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("dashboards")
    command = captured_command([str(bundled_model.path()), "--enforce-eager"])
    with serving(command, {}, directory / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def ask(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Return a function that queries a Prometheus which has seen load for some scrapes."""
    directory = tmp_path_factory.mktemp("prometheus")
    with prometheus(server, directory, rule_files=[str(RULES)]) as ask:
        give_load(server, ask)
        yield ask


def give_load(server: Server, ask: Query) -> None:
    questions = [item.question for item in datasets.sample()]
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        asyncio.run(_load(server, questions[:16]))
        if ask("sum(increase(moescope_trace_rows_total[10s])) > 0") and ask(
            "moescope:expert_share:rate5m"
        ):
            return
    pytest.fail(f"Prometheus has not seen the load within {WAIT_S:g} s")


async def _load(server: Server, questions: list[str]) -> None:
    async with replay.connect(server.url, API_KEY) as http:
        options = replay.Options(max_tokens=24, concurrency=8)
        replay.require_all(await replay.replay(questions, http, options))


def substituted(expression: str) -> str:
    """Fill in the variables as Grafana would with all chosen."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def test_every_query_returns_data(ask: Query, capsys: pytest.CaptureFixture[str]) -> None:
    lines, empty = [], []
    for name in build.BOARDS:
        for panel in panels(json.loads((build.GENERATED / f"{name}.json").read_text())):
            for target in panel["targets"]:
                expression = substituted(target["expr"])
                found = ask(expression)
                lines.append(f"{name:9} | {panel['title'][:24]:24} | {len(found):4} | {expression}")
                if not found:
                    empty.append(lines[-1])
    for rule in rules():
        found = ask(rule["expr"])
        kind = rule.get("record") or rule["alert"]
        lines.append(f"{'rules':9} | {kind[:24]:24} | {len(found):4} | {rule['expr']}")
        if "record" in rule and not ask(rule["record"]):
            empty.append(lines[-1])
    with capsys.disabled():
        print("\n\ndashboard | panel                    | series | query")
        print("\n".join(lines), file=sys.stdout)
    assert not empty, "no data:\n" + "\n".join(empty)


def test_every_variable_offers_something(ask: Query) -> None:
    for name in build.BOARDS:
        board = json.loads((build.GENERATED / f"{name}.json").read_text())
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                query = variable["query"]
                selector, label = query.removeprefix("label_values(")[:-1].rsplit(", ", 1)
                found = ask(f"count by ({label}) ({substituted(selector)})")
                assert found, (name, variable["name"])
                assert all(one["metric"] for one in found), (name, variable["name"])


def test_nothing_is_wrong_with_a_server_that_is_well(ask: Query) -> None:
    firing = ask('ALERTS{alertstate="firing"}')
    assert not firing, firing


def test_it_is_there_when_the_picture_is_drawn(ask: Query, tmp_path: Path) -> None:
    from dashboards import draw

    draw.draw(lambda expression: ask(substituted(expression)), tmp_path / "experts.png")
    assert (tmp_path / "experts.png").stat().st_size > 20_000
