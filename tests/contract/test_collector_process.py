"""The collector's process goes on whatever fails in it, and counts it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import zmq

from moescope_service.collector import process
from moescope_service.collector.core import Collector
from moescope_service.limited_logger import LimitedLogger
from moescope_service.runtime import collector_address
from moescope_service.settings import Settings
from tests.waiting import DEADLINE_S, SCRAPE_TIMEOUT_S, wait_until

logger = logging.getLogger("moescope.test")


@pytest.fixture
def collector():
    return Collector(Settings())


@pytest.fixture
def limited_logger():
    return LimitedLogger(logger)


def fail(*args):
    raise RuntimeError("a fault")


def test_a_piece_of_work_that_fails_is_left_out(collector, limited_logger, monkeypatch, caplog):
    monkeypatch.setattr(collector, "work", fail)
    assert process._work(collector, limited_logger) is True  # there may be more of it
    assert collector.state.stats.errors == 1
    assert "a fault" in caplog.text


def test_a_tick_that_fails_is_left_out(collector, limited_logger, monkeypatch):
    monkeypatch.setattr(collector, "tick", fail)
    process._tick(collector, limited_logger)
    assert collector.state.stats.errors == 1


def test_a_message_that_cannot_be_sent_is_left_out_as_a_whole(collector, limited_logger, caplog):
    scattered = np.zeros((4, 4))[:, 0]  # a frame is contiguous
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
            dealer.connect(f"tcp://127.0.0.1:{port}")
            dealer.send_multipart([b"hello"])
            router.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
            peer, *_ = router.recv_multipart()
            collector.state.outbox.append((peer, [b"head", scattered]))
            collector.state.outbox.append((peer, [b"next", np.arange(3, dtype=np.uint8)]))
            process._send(router, collector, limited_logger)
            assert dealer.recv_multipart() == [b"next", b"\x00\x01\x02"]
    assert collector.state.outbox == []
    assert collector.state.stats.errors == 1
    assert "cannot be sent" in caplog.text


def test_what_fails_is_in_the_metrics(deployment):
    def metrics() -> str:
        return deployment.http.get("/metrics", timeout=SCRAPE_TIMEOUT_S).text

    name = 'moescope_collector_errors_total{model_name="tiny"}'
    assert f"{name} 0.0" in metrics()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(collector_address())
        socket.send_multipart([b"nonsense"])
        wait_until(lambda: f"{name} 1.0" in metrics(), "the message is left out, and counted")
    deployment.complete("afterwards")
    assert deployment.http.get("/routes/cmpl-afterwards").status_code == 200
