"""A collector that was killed comes back and knows what it has to know, and nothing more."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import random
import signal
import sys
import threading

import numpy as np
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine import FinishReason

from moescope import formats
from moescope_service.runtime import Supervisor, collector_address
from tests.waiting import scrape, wait_until

from .deployment import Deployment, start_collector
from .fake_engine import PROMPT, SPEC, Running, rows_of
from .test_runtime import is_alive, start_parent


class Request:
    """One request, step by step."""

    def __init__(self, deployment: Deployment, name: str) -> None:
        self.deployment, self.name = deployment, name
        (internal_id,) = deployment.frontend.add(name)
        self.running = deployment.engine.start(internal_id)

    def decode(self, count: int) -> None:
        for _ in range(count):
            self.deployment.engine.step([(self.running, 1)])

    def finish(self, num_output: int) -> None:
        frontend, internal_id = self.deployment.frontend, self.running.internal_id
        frontend.put(internal_id, [1] * num_output, FinishReason.STOP)

    def end(self) -> None:
        self.deployment.engine.step(finished=[self.running])


def restart(deployment: Deployment, while_away=lambda: None, epoch: int = 1) -> None:
    """Kill the collector, do something, start another and wait until all have met."""
    link = client_link(deployment)
    deployment.kill_collector()
    wait_until(lambda: link.is_away, "the API server notices")
    wait_until(lambda: deployment.engine.recorder._link.is_away, "the worker notices")
    while_away()
    deployment.collector.stdout.close()
    deployment.collector = start_collector(collector_address(), epoch=epoch)
    wait_until(lambda: info(deployment).get("spec"), "the worker introduces itself")


def client_link(deployment: Deployment):
    return deployment.app.state.moescope_collector._link


def info(deployment: Deployment) -> dict:
    answer = deployment.http.get("/moescope/info")
    return {"spec": True} | answer.json() if answer.status_code == 200 else {}


def get(deployment: Deployment, request_id: str):
    return deployment.http.get(f"/routes/{request_id}?wait_s=10&format=npz")


def trace_of(deployment: Deployment, request_id: str):
    answer = get(deployment, request_id)
    assert answer.status_code == 200, answer.text
    return check(answer)


def check(answer):
    """The trace of an answer, its rows compared with the truth, and their sources in short."""
    (trace,) = formats.load_npz(answer.content)
    here = np.array([source != 2 for source in trace.source])
    want = rows_of(0, trace.num_rows)
    np.testing.assert_array_equal(trace.topk_ids[here], want[0][here])
    np.testing.assert_array_equal(trace.topk_weights[here], want[1][here])
    return trace, "".join("CcM"[source] for source in trace.source)


def sample(deployment: Deployment, name: str) -> float:
    (line,) = (
        one
        for one in scrape(deployment.url).splitlines()
        if one.startswith((name + " ", name + "{"))
    )
    return float(line.rsplit(" ", 1)[1])


def test_a_running_request_ends_with_true_coverage(fresh):
    request = Request(fresh, "a")
    request.decode(3)
    restart(fresh, lambda: request.decode(2))
    request.decode(4)
    request.finish(10)
    request.end()
    trace, sources = trace_of(fresh, "a")
    assert sources == "M" * 10 + "C" * 4
    assert not trace.complete
    assert trace.coverage == 4 / 14
    assert (trace.prompt_len, trace.num_tokens, trace.finish_reason) == (5, 15, "stop")
    assert trace.token_ids.tolist() == [*PROMPT, *[1] * 10]
    labels = 'cause="restart",model_name="tiny"'
    assert sample(fresh, f"moescope_trace_rows_missing_total{{{labels}}}") == 10
    assert sample(fresh, "moescope_collector_restarts_total") == 1
    assert sample(fresh, "moescope_step_gaps_total") == 0


def test_later_requests_are_complete_and_earlier_ones_are_gone(fresh):
    fresh.complete("before")
    assert fresh.http.get("/routes/cmpl-before").status_code == 200
    restart(fresh)
    for epoch in (2, 3):
        fresh.complete(f"after-{epoch}")
        trace, sources = trace_of(fresh, f"cmpl-after-{epoch}")
        assert trace.complete
        assert set(sources) == {"C"}
        assert fresh.http.get("/routes/cmpl-before").status_code == 404
        restart(fresh, epoch=epoch)
        assert fresh.http.get(f"/routes/cmpl-after-{epoch}").status_code == 404


def test_a_hit_on_blocks_filled_before_is_missing(fresh):
    before = Request(fresh, "before")
    before.decode(4)  # two whole blocks of 4 tokens
    restart(fresh)
    (internal_id,) = fresh.frontend.add("hit")
    blocks = [*before.running.block_ids[:1], *fresh.engine._blocks(4)]
    hit = Running(internal_id, num_rows=4, block_ids=blocks)
    new = NewRequestData(internal_id, PROMPT, [], None, None, (blocks,), 4, None)
    fresh.engine.step([(hit, 1)], new=[new])
    fresh.frontend.put(internal_id, [1], FinishReason.STOP)
    fresh.engine.step(finished=[hit])
    trace, sources = trace_of(fresh, "hit")
    assert (sources, trace.cached_len, trace.complete) == ("MMMMC", 4, False)


def test_what_happens_while_it_is_away(fresh):
    ends_for_both, ends_for_worker = Request(fresh, "both"), Request(fresh, "worker")
    begun = []

    def while_away() -> None:
        ends_for_both.finish(1)
        ends_for_both.end()
        ends_for_worker.end()
        begun.append(Request(fresh, "begun"))
        answer = fresh.http.get("/routes/begun")
        assert answer.status_code == 503
        assert "started again" in answer.json()["error"]["message"]
        assert "moescope_collector_up 0.0" in fresh.http.get("/metrics").text

    restart(fresh, while_away)
    trace, sources = trace_of(fresh, "both")
    assert (sources, trace.finish_reason, trace.complete) == ("M" * 5, "stop", False)
    ends_for_worker.finish(3)
    trace, sources = trace_of(fresh, "worker")
    assert (sources, trace.complete) == ("M" * 7, False)
    assert fresh.http.get("/routes/begun").status_code == 202
    begun[0].decode(1)
    begun[0].finish(2)
    begun[0].end()
    assert trace_of(fresh, "begun")[1] == "MMMMMC"


def test_a_choice_that_ended_before_is_not_left_out(fresh):
    names = fresh.frontend.add("two", n=2)
    first, second = (fresh.engine.start(name) for name in names)
    fresh.engine.step([(first, 1), (second, 1)])
    fresh.frontend.put(names[0], [1, 1], FinishReason.STOP)
    fresh.engine.step([(second, 1)], finished=[first])
    restart(fresh)
    fresh.engine.step([(second, 1)])
    fresh.frontend.put(names[1], [1] * 4, FinishReason.LENGTH)
    fresh.engine.step(finished=[second])
    answer = get(fresh, "two")
    assert answer.status_code == 200
    gone, kept = formats.load_npz(answer.content)
    assert (gone.index, gone.num_tokens, gone.finish_reason) == (0, len(PROMPT) + 2, "stop")
    assert (gone.complete, gone.coverage) == (False, 0.0)
    assert (kept.index, kept.coverage) == (1, 1 / 8)
    journal = fresh.app.state.moescope_collector._outbox.journal
    wait_until(lambda: len(journal) == 0, "the API server forgets it")


def test_a_pause_outlives_it_and_so_does_an_alias(fresh):
    assert fresh.http.post("/routes/pause").status_code == 200
    recorder = fresh.engine.recorder
    wait_until(lambda: not recorder._is_capturing, "the worker is told")
    request = Request(fresh, "a")
    tell = fresh.app.state.moescope_collector.tell
    tell("alias", internal_ids=[request.running.internal_id], alias="other")
    wait_until(lambda: fresh.http.get("/routes/other").status_code == 202, "the id is known")
    restart(fresh)
    assert info(fresh)["capture"] == "paused"
    assert not recorder._is_capturing
    assert fresh.http.get("/routes/other").status_code == 202
    assert fresh.http.post("/routes/resume").status_code == 200
    wait_until(lambda: recorder._is_capturing, "the worker is told")


def test_a_pause_outlives_it_before_the_first_step(fresh):
    assert fresh.http.post("/routes/pause").status_code == 200
    wait_until(lambda: not fresh.engine.recorder._is_capturing, "the worker is told")
    restart(fresh)
    assert info(fresh)["capture"] == "paused"
    assert not fresh.engine.recorder._is_capturing


def test_a_deleted_request_does_not_come_back(fresh):
    request = Request(fresh, "secret")
    wait_until(lambda: fresh.http.get("/routes/secret").status_code == 202, "it is known")
    assert fresh.http.delete("/routes/secret").status_code in {200, 204}
    journal = fresh.app.state.moescope_collector._outbox.journal
    wait_until(lambda: len(journal) == 0, "the API server forgets it")
    restart(fresh)
    request.finish(1)
    request.end()
    assert fresh.http.get("/routes/secret").status_code == 404


def test_killed_again_and_again_under_load():
    """Rows are right or missing, whatever the moment."""
    with Deployment(spec=dataclasses.replace(SPEC, num_blocks=2**17)).running() as deployment:
        counts = run_and_kill(deployment, 3)
        wait_until(lambda: info(deployment).get("spec"), "all have met")
        deployment.complete("last")
        assert trace_of(deployment, "cmpl-last")[0].complete
    print(f"requests by their end: {dict(counts)}")


def run_and_kill(deployment: Deployment, num_deaths: int) -> collections.Counter[str]:
    """Run requests; kill the collector whenever five more of them were complete."""
    is_over = threading.Event()
    counts: collections.Counter[str] = collections.Counter()
    rng = random.Random(0)

    def kill() -> None:
        for epoch in range(1, num_deaths + 1):
            wanted = counts["complete"] + 5
            wait_until(
                lambda wanted=wanted: counts["complete"] >= wanted or is_over.is_set(),
                "five more are complete",
            )
            is_over.wait(rng.uniform(0, 0.05))  # somewhere in one of the next requests
            deployment.kill_collector()
            deployment.collector.stdout.close()
            deployment.collector = start_collector(collector_address(), epoch=epoch)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        while killer.is_alive():
            request = Request(deployment, f"r{counts.total()}")
            request.decode(20)
            request.finish(21)
            request.end()
            answer = get(deployment, request.name)
            assert answer.status_code in {200, 404, 503}, answer.text
            if answer.status_code == 200:
                counts["complete" if check(answer)[0].complete else "incomplete"] += 1
            else:
                counts["gone"] += 1
    finally:
        is_over.set()
        killer.join()
    return counts


def test_the_first_process_starts_it_again_and_ends_it():
    with start_parent() as parent:
        first, directory = parent.stdout.readline().split()
        os.kill(int(first), signal.SIGKILL)
        errors = iter(parent.stderr)
        assert f"{first} ended with code -9" in next(errors)
        second = int(next(errors).split()[-3])
        assert is_alive(second)
        parent.terminate()
        parent.communicate(timeout=20)
        wait_until(lambda: not is_alive(second), "it ends with its parent")
        wait_until(lambda: not os.path.exists(directory), "its directory is removed")  # noqa: PTH110


def test_one_that_ends_at_once_is_not_started_without_pause(tmp_path, monkeypatch, caplog):
    supervisor = Supervisor(f"ipc://{tmp_path / 's'}", first_pause_s=0.01)
    with caplog.at_level(logging.ERROR, "moescope"):
        assert supervisor.start() is None
        monkeypatch.setenv("MOESCOPE_ROUTES_MEMORY", "nonsense")  # no collector starts any more
        os.kill(supervisor.pid, signal.SIGKILL)
        wait_until(lambda: len(caplog.records) >= 4, "it is tried again")
    ended = [record.args for record in caplog.records]
    assert [pause_s for *_, pause_s in ended[:4]] == [0.01, 0.02, 0.04, 0.08]
    (tmp_path / "s").unlink()
    monkeypatch.delenv("MOESCOPE_ROUTES_MEMORY")
    wait_until((tmp_path / "s").exists, "the next one starts")
    assert supervisor.pid not in [pid for _, pid, *_ in ended]
    assert supervisor.stop() in {0, -signal.SIGTERM}


def test_it_is_tried_again_where_the_system_starts_no_process(tmp_path, monkeypatch, caplog):
    supervisor = Supervisor(f"ipc://{tmp_path / 's'}", first_pause_s=0.01)
    assert supervisor.start() is None
    first = supervisor.pid
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "moescope"):
        patch.setattr(sys, "executable", str(tmp_path / "nothing"))
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(caplog.records) >= 4, "it is tried again")
    messages = [record.getMessage() for record in caplog.records[:4]]
    assert [message.split(": ")[0] for message in messages[1::2]] == [
        "no collector process can be started"
    ] * 2
    assert ["in 0.01 s" in messages[0], "in 0.02 s" in messages[2]] == [True, True]
    wait_until(lambda: supervisor.pid != first, "the next one starts")
    assert supervisor._epoch == 2, "there were two collectors"
    assert supervisor.stop() in {0, -signal.SIGTERM}


def test_a_collector_that_no_worker_has_met_says_so(fresh):
    """Right after its start: the counts are nobody's, and nothing is reset."""
    fresh.engine.recorder._link._introduce = tuple
    link = client_link(fresh)
    fresh.kill_collector()
    fresh.collector.stdout.close()
    fresh.collector = start_collector(collector_address(), epoch=1)
    wait_until(lambda: link._is_connected, "the API server meets it")
    for method, path in (("GET", "/experts"), ("POST", "/routes/reset"), ("GET", "/moescope/info")):
        answer = fresh.http.request(method, path)
        assert answer.status_code == 503, path
        assert "no worker has said" in answer.json()["error"]["message"]
