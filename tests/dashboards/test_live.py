"""Every query of every panel and rule against a real Prometheus that scrapes a real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dashboards import build
from moescope import datasets, replay
from moescope.servers import Server, captured_command, free_ports
from moescope_service import bundled_model
from tests.e2e.conftest import API_KEY, serving

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
def ask(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a function that queries a Prometheus which has seen load for some scrapes."""
    directory, (port,) = tmp_path_factory.mktemp("prometheus"), free_ports(1)
    target = server.url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "moescope", "static_configs": [{"targets": [target]}]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))
    command = ["prometheus", f"--config.file={directory / 'prometheus.yml'}",
               f"--storage.tsdb.path={directory / 'data'}",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (directory / "prometheus.log").open("wb") as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        except FileNotFoundError:
            pytest.skip("prometheus is not installed (Debian's package prometheus)")
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10.0) as http:
                yield _loaded(http, server)
        finally:
            process.terminate()
            process.wait(20)


def _loaded(http: httpx.Client, server: Server) -> Any:
    def ask(expression: str) -> list[Any]:
        answer = http.get("/api/v1/query", params={"query": expression})
        body = answer.json()
        assert body["status"] == "success", f"{expression}: {body}"
        return list(body["data"]["result"])

    questions = [item.question for item in datasets.sample()]
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        asyncio.run(_load(server, questions[:16]))
        try:
            if ask("sum(increase(moescope_trace_rows_total[10s])) > 0") and ask(
                "moescope:expert_share:rate5m"
            ):
                return ask
        except httpx.TransportError:  # not up yet
            time.sleep(0.2)
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


def test_every_query_returns_data(ask: Any, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_every_variable_offers_something(ask: Any) -> None:
    for name in build.BOARDS:
        board = json.loads((build.GENERATED / f"{name}.json").read_text())
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                query = variable["query"]
                selector, label = query.removeprefix("label_values(")[:-1].rsplit(", ", 1)
                found = ask(f"count by ({label}) ({substituted(selector)})")
                assert found, (name, variable["name"])
                assert all(one["metric"] for one in found), (name, variable["name"])


def test_nothing_is_wrong_with_a_server_that_is_well(ask: Any) -> None:
    firing = ask('ALERTS{alertstate="firing"}')
    assert not firing, firing


def test_it_is_there_when_the_picture_is_drawn(ask: Any, tmp_path: Path) -> None:
    from dashboards import draw

    draw.draw(lambda expression: ask(substituted(expression)), tmp_path / "experts.png")
    assert (tmp_path / "experts.png").stat().st_size > 20_000
