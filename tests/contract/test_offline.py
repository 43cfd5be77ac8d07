"""What a script without a server does, without a model."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from moescope_service import runtime
from moescope_service.errors import RefusedError
from moescope_service.frontend import collector_client
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.offline import OfflineCapture
from moescope_service.settings import RUNTIME_DIR, Settings
from tests.waiting import wait_until

from .deployment import Deployment, start_collector, stop_collector
from .fake_engine import OUTPUT, PROMPT


def test_a_refusal_leaves_no_thread_behind(tmp_path_factory, monkeypatch):
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path_factory.mktemp("z")))
    monkeypatch.setattr(collector_client, "WORKERS_TIMEOUT_S", 0.1)
    collector, before = start_collector(runtime.collector_address()), threading.enumerate()
    try:
        with pytest.raises(RefusedError, match="not every worker reported"):
            OfflineCapture(None, Settings())
    finally:
        stop_collector(collector)
    assert set(threading.enumerate()) <= set(before)


def num_made(deployment):
    store = deployment.http.get("/moescope/info").json()["store"]
    return store["traces"] + store["evicted"]


def output_of(request_id, n):
    choices = [SimpleNamespace(token_ids=OUTPUT)] * n
    return SimpleNamespace(request_id=request_id, prompt_token_ids=PROMPT, outputs=choices)


def test_routes_come_for_every_choice_or_not_at_all():
    with Deployment(memory="20k").running() as small:  # room for five traces
        capture = OfflineCapture.__new__(OfflineCapture)
        capture._collector = CollectorClient(runtime.collector_address())
        try:
            ended = {f"{number}": small.frontend.serve(f"{number}", n=2) for number in range(4)}
            for index in (0, 1):  # each one's first choice, then each one's second
                for number, sequences in enumerate(ended.values()):
                    small.engine.step(finished=[sequences[index]])
                    wait_until(lambda n=4 * index + number: num_made(small) == n + 1, "its trace")
            for request_id in "02":
                with pytest.raises(LookupError, match="made room for newer ones"):
                    capture.routes(output_of(request_id, 2))
            for request_id in "13":
                traces = capture.routes(output_of(request_id, 2))
                assert [trace.index for trace in traces] == [0, 1]
                with pytest.raises(ValueError, match="is it another LLM's"):
                    capture.routes(output_of(request_id, 1))
        finally:
            capture._collector.close()
