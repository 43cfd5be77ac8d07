"""Every query of every panel and rule against a real Prometheus that scrapes a real server."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.simulation.server import API_KEY, serving
from dashboards import build, draw
from moescope import datasets, http, replay
from moescope.servers import Server, captured_command
from moescope_service import bundled_model
from tests.e2e.prometheus import Query, prometheus

from .test_generated import panels
from .test_rules import RULES, rules

WAIT_S = 90.0
RANGE_S, RATE_INTERVAL_S = 60, 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("dashboards")
    archive = ["--routes-archive", str(directory / "archive")]
    command = captured_command([str(bundled_model.path()), "--enforce-eager", *archive])
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
    async with http.connect_async(server.url, API_KEY) as client:
        options = replay.ReplayOptions(max_tokens=24, concurrency=8)
        responses = await replay.replay(questions, client, options)
        assert [one.error for one in responses if one.error] == []


def test_every_query_returns_data(ask: Query, capsys: pytest.CaptureFixture[str]) -> None:
    lines, empty = [], []
    for name in build.BOARDS:
        board = json.loads((build.GENERATED / f"{name}.json").read_text())
        source = draw.Source(ask, RANGE_S, RATE_INTERVAL_S, draw.first_values(board, ask))
        for panel in panels(board):
            for target in panel["targets"]:
                expression = source.expression(target["expr"])
                found = ask(expression)
                lines.append(f"{name:9} | {panel['title'][:24]:24} | {len(found):4} | {expression}")
                if not found:
                    empty.append(lines[-1])
    for rule in rules():
        found = ask(rule["expr"])
        kind = rule.get("record") or rule["alert"]
        lines.append(f"{'rules':9} | {kind[:24]:24} | {len(found):4} | {rule['expr']}")
        is_filtered = "worst_layer" in kind  # of enough rows, and of layers with idle experts
        if "record" in rule and not is_filtered and not ask(rule["record"]):
            empty.append(lines[-1])
    with capsys.disabled():
        print("\n\ndashboard | panel                    | series | query")
        print("\n".join(lines), file=sys.stdout)
    assert not empty, "no data:\n" + "\n".join(empty)


def test_every_variable_offers_something(ask: Query) -> None:
    source = draw.Source(ask, RANGE_S, RATE_INTERVAL_S)
    for name in build.BOARDS:
        board = json.loads((build.GENERATED / f"{name}.json").read_text())
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                query = variable["query"]
                selector, label = query.removeprefix("label_values(")[:-1].rsplit(", ", 1)
                found = ask(f"count by ({label}) ({source.expression(selector)})")
                assert found, (name, variable["name"])
                assert all(one["metric"] for one in found), (name, variable["name"])


def test_nothing_is_wrong_with_a_server_that_is_well(ask: Query) -> None:
    firing = ask('ALERTS{alertstate="firing"}')
    assert not firing, firing


@pytest.mark.parametrize("name", build.BOARDS)
def test_a_picture_is_drawn(ask: Query, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.png"
    draw.draw(name, ask, path, range_s=RANGE_S, rate_interval_s=RATE_INTERVAL_S)
    assert 15_000 < path.stat().st_size < 200_000
