"""What a script without a server does, without a model."""

from __future__ import annotations

import threading

import pytest

from moescope_service import runtime
from moescope_service.api import collector_client
from moescope_service.errors import RefusedError
from moescope_service.offline import OfflineCapture
from moescope_service.settings import RUNTIME_DIR, Settings

from .deployment import start_collector, stop_collector


def test_a_refusal_leaves_no_thread_behind(tmp_path_factory, monkeypatch):
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path_factory.mktemp("z")))
    monkeypatch.setattr(collector_client, "HELLO_TIMEOUT_S", 0.1)
    collector = start_collector(runtime.collector_address())
    try:
        with pytest.raises(RefusedError, match="not every worker reported"):
            OfflineCapture(None, Settings())
    finally:
        stop_collector(collector)
    assert "moescope-collector-client" not in [thread.name for thread in threading.enumerate()]
