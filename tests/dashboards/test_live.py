"""Every query of every panel and rule against a real Prometheus that scrapes two real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulation.server import API_KEY, MODEL, START_TIMEOUT_S, made
from dashboards import build, draw
from moescope import Client, datasets, http, replay
from moescope.archive import Archive
from moescope.servers import Server, captured_command, wait_ready
from moescope_service import bundled_model
from tests.e2e.prometheus import Query, instance, prometheus
from tests.waiting import wait_until

from .test_generated import panels
from .test_rules import RULES, rules

WAIT_S = 90.0
RANGE_S, RATE_INTERVAL_S = 60, 10
LOADS = {MODEL: (16, 24), "second": (5, 11)}
"""By the name of a server's model: how many prompts are asked at once, and tokens of each."""
BOARDS = {name: json.loads((build.GENERATED / f"{name}.json").read_text()) for name in build.BOARDS}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the archive of both."""
    return tmp_path_factory.mktemp("archive")


@pytest.fixture(scope="module")
def servers(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Start two, each named after its model."""
    directory = tmp_path_factory.mktemp("dashboards")
    with contextlib.ExitStack() as stack:
        started = []
        for name in LOADS:
            command = captured_command([str(bundled_model.path()), "--enforce-eager"])
            command += ["--routes-archive", str(archive / f"server={name}")]
            command += ["--routes-archive-interval", "1"]
            flags = ["--served-model-name", name]
            server = made(command, {}, directory / f"{name}.log", flags)
            started.append(stack.enter_context(server))
        wait_ready(started, START_TIMEOUT_S)
        yield started


@pytest.fixture(scope="module")
def served() -> dict[str, list[str]]:
    """Return the requests that each model has answered."""
    return {name: [] for name in LOADS}


@pytest.fixture(scope="module")
def ask(
    servers: list[Server], served: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Query]:
    """Return a function that queries a Prometheus which has seen load for some scrapes."""
    directory = tmp_path_factory.mktemp("prometheus")
    with prometheus(servers, directory, rule_files=[str(RULES)]) as ask:
        give_load(servers, served, ask)
        yield ask


def give_load(servers: list[Server], served: dict[str, list[str]], ask: Query) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        asyncio.run(_load(servers, served))
        seen = [
            len(ask(f"count by (instance) ({one})"))
            for one in (
                "increase(moescope_trace_rows_total[10s]) > 0",
                "moescope:expert_share:rate5m",
            )
        ]
        if seen == [len(servers)] * 2:
            return
    pytest.fail(f"Prometheus has not seen the load within {WAIT_S:g} s")


async def _load(servers: list[Server], served: dict[str, list[str]]) -> None:
    async def of(server: Server) -> None:
        num_prompts, max_tokens = LOADS[server.name]
        questions = [item.question for item in datasets.sample()][:num_prompts]
        async with http.connect_async(server.url, API_KEY) as client:
            options = replay.ReplayOptions(max_tokens=max_tokens, concurrency=8)
            responses = await replay.replay(questions, client, options)
        assert [one.error for one in responses if one.error] == []
        assert {one.model for one in responses} == {server.name}
        served[server.name] += [str(one.request_id) for one in responses]

    await asyncio.gather(*map(of, servers))


def test_every_query_returns_data(ask: Query, capsys: pytest.CaptureFixture[str]) -> None:
    lines, empty = [], []
    for name, board in BOARDS.items():
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


def offered(variable: Mapping[str, Any], source: draw.Source) -> list[str]:
    """Return what a variable offers, when those before it are chosen as the source has them."""
    query = variable["query"]
    selector, label = query.removeprefix("label_values(")[:-1].rsplit(", ", 1)
    found = source.ask(f"count by ({label}) ({source.expression(selector)})")
    values = [one["metric"].get(label, "") for one in found]
    return sorted(values, key=lambda value: (len(value), value))


def test_every_variable_offers_something(ask: Query) -> None:
    for board in BOARDS.values():
        source = draw.Source(ask, RANGE_S, RATE_INTERVAL_S, draw.first_values(board, ask))
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                values = offered(variable, source)
                assert values, variable["name"]
                assert all(values), variable["name"]


def choose(board: Mapping[str, Any], ask: Query, **chosen: str) -> draw.Source:
    """Return what answers with some variables chosen, and of the others what Grafana chooses.

    That is all that is offered, or the first one where a variable takes a single value.
    """
    for variable in board["templating"]["list"]:
        if variable["type"] == "query" and variable["name"] not in chosen:
            source = draw.Source(ask, RANGE_S, RATE_INTERVAL_S, chosen)
            values = offered(variable, source)
            chosen[variable["name"]] = "|".join(values) if variable["multi"] else values[0]
    return draw.Source(ask, RANGE_S, RATE_INTERVAL_S, chosen)


def alone(expression: str, server: Server) -> str:
    """Return an expression of the series of one server alone, whatever it chooses itself."""

    def selector(found: re.Match[str]) -> str:
        return f'{found[1]}{{instance="{instance(server)}"' + (", " if found[2] else "}")

    return re.sub(r"\b((?:moescope|vllm)[_:][\w:]+)({)?", selector, expression)


def numbers(found: list[Any]) -> dict[frozenset[tuple[str, str]], float]:
    return {frozenset(one["metric"].items()): float(one["value"][1]) for one in found}


@pytest.mark.parametrize("number", range(len(LOADS)))
@pytest.mark.parametrize("variable", ["instance", "model"])
def test_a_chosen_server_is_shown_alone(
    ask: Query, servers: list[Server], variable: str, number: int
) -> None:
    server, at_s = servers[number], time.time() - 1
    chosen = instance(server) if variable == "instance" else server.name
    num_other = num_shown = 0
    for board in BOARDS.values():
        source = choose(board, ask, **{variable: chosen})
        assert chosen in {*source.variables.values()}
        for panel in panels(board):
            for target in panel["targets"]:
                expression = source.expression(target["expr"])
                # Without the choice: what the panel shows if its query leaves it out.
                of_both = re.sub(r'(instance|model_name)=~?"[^"]*"', r'\1=~".+"', expression)
                expected = numbers(ask(alone(of_both, server), at_s))
                shown = numbers(ask(expression, at_s))
                same = pytest.approx(expected, rel=1e-9, nan_ok=True)
                assert shown == same, f"{panel['title']}: {expression}"
                assert shown, f"{panel['title']}: {expression}"
                num_shown += 1
                num_other += numbers(ask(of_both, at_s)) != same
    assert num_other > num_shown / 2, "the servers hardly differ: that shows little"


def test_rules_keep_the_servers_apart(ask: Query, servers: list[Server]) -> None:
    at_s, num_shown = time.time() - 1, 0
    for rule in rules():
        value = re.sub(r" (>|==) [\d.]+$", "", rule["expr"])  # of an alert, whatever it is
        assert ("alert" in rule) == (value != rule["expr"]), rule
        found = numbers(ask(value, at_s))
        kept = 0
        for server in servers:
            own = {("instance", instance(server)), ("model_name", server.name)}
            of_it = {labels: one for labels, one in found.items() if labels & own}
            for labels in of_it:
                assert {pair for pair in labels if pair[0] in ("instance", "model_name")} <= own
            expected = numbers(ask(alone(value, server), at_s))
            assert of_it == pytest.approx(expected, rel=1e-9, nan_ok=True), rule
            kept += len(of_it)
        assert kept == len(found), f"of no server: {rule}"
        num_shown += kept >= len(servers)
    assert num_shown > len(rules()) / 2


def test_an_alert_is_of_the_server_that_it_names(ask: Query, servers: list[Server]) -> None:
    first, second = servers
    with Client(second.url, api_key=API_KEY) as client:
        client.pause()
        try:
            (alert,) = wait_until(lambda: ask('ALERTS{alertname="MoescopeCapturePaused"}'), "alert")
        finally:
            client.resume()
    named = {label: alert["metric"][label] for label in ("instance", "model_name")}
    assert named == {"instance": instance(second), "model_name": "second"}
    assert named["instance"] != instance(first)


def test_the_archive_has_the_traces_of_both(
    ask: Query, servers: list[Server], served: dict[str, list[str]], archive: Path
) -> None:
    total = sum(map(len, served.values()))
    wait_until(lambda: len(list(Archive(archive).scan())) >= total, "all is archived")
    found = [(one.trace.model, one.trace.request_id) for one in Archive(archive).scan()]
    assert sorted(found) == sorted((name, one) for name in served for one in served[name])
    assert len({*found}) == total
    for server in servers:
        own = sorted(served[server.name])
        folder = archive / f"server={server.name}"
        for one in (Archive(folder).scan(), Archive(archive).scan(model=server.name)):
            assert sorted(archived.trace.request_id for archived in one) == own
    counts = {
        frozenset({("instance", instance(one)), ("model_name", one.name)}): len(served[one.name])
        for one in servers
    }
    query = "sum by (instance, model_name) (moescope_archive_traces_total)"
    wait_until(lambda: numbers(ask(query)) == counts, "Prometheus sees them")


def test_nothing_is_wrong_with_servers_that_are_well(ask: Query) -> None:
    firing = ask('ALERTS{alertstate="firing"}')
    assert not firing, firing


@pytest.mark.parametrize("name", build.BOARDS)
def test_a_picture_is_drawn(ask: Query, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.png"
    draw.draw(name, ask, path, range_s=RANGE_S, rate_interval_s=RATE_INTERVAL_S)
    assert 15_000 < path.stat().st_size < 200_000
