"""One engine over several nodes: what reaches the collector over tcp, and who is refused there."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import socket

import numpy as np
import pytest
import zmq
from vllm.v1.engine import FinishReason

from benchmarks.faults.tcp_proxy import TcpProxy
from moescope_service import addresses
from moescope_service.addresses import Address
from moescope_service.collector.node_links import listening
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.messages import Register, pack
from moescope_service.node_key import NodeKey, make_key, read_key
from moescope_service.queries import InfoQuery
from tests.waiting import DEADLINE_S, scrape, wait_until

from .deployment import Deployment
from .fake_engine import SPEC, Engine, rows_of

TOKENS = np.arange(70_001, 70_065, dtype=np.int32)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    make_key(path)
    return path


@pytest.fixture
def key(key_file):
    return read_key(key_file)


@pytest.fixture
def proxy(port):
    with TcpProxy(("127.0.0.1", port), is_recording=True) as proxy:
        yield proxy


def through(proxy, key_file):
    return Address(f"tcp://127.0.0.1:{proxy.port}", read_key(key_file))


def over_tcp(port, proxy, key_file, **flags):
    """Its worker reaches the collector through the proxy, its API server without it."""
    flags |= {"bind": f"localhost:{port}", "key_file": str(key_file)}
    return Deployment(**{"worker_address": through(proxy, key_file), **flags})


@pytest.fixture
def deployment(port, proxy, key_file):
    with over_tcp(port, proxy, key_file).running() as deployment:
        yield deployment


def link(deployment):
    return deployment.engine.recorder._link


def fetch(deployment, request_id):
    answer = deployment.http.get(f"/routes/{request_id}?wait_s=10")
    assert answer.status_code == 200, answer.text
    (trace,) = answer.json()["traces"]
    return trace


def sample(deployment, name):
    (line,) = (
        one for one in scrape(deployment.url).splitlines() if one.startswith(name) and one[0] != "#"
    )
    return float(line.split()[-1])


def causes(deployment):
    lines = scrape(deployment.url).splitlines()
    found = [one for one in lines if one.startswith("moescope_trace_rows_missing_total{")]
    values = {one.split('cause="')[1].split('"')[0]: float(one.split()[-1]) for one in found}
    return {name: value for name, value in values.items() if value}


def test_routes_of_a_worker_and_an_api_server_of_other_nodes(deployment, proxy):
    deployment.complete("a")
    assert fetch(deployment, "cmpl-a")["complete"]
    assert proxy.num_connections == 1
    assert sample(deployment, "moescope_links_refused_total") == 0
    assert sample(deployment, "moescope_collector_lag_seconds") < DEADLINE_S


class Stranger:
    """Somebody who reaches the port."""

    def __init__(self, port, key):
        self.port, self.key = port, key

    def without_a_key(self):
        self._ask(lambda one: None)

    def with_a_key_of_its_own(self):
        """It knows the collector's public key, which is no secret in CURVE."""
        public, secret = zmq.curve_keypair()

        def set_up(one):
            one.curve_serverkey, one.curve_publickey, one.curve_secretkey = (
                self.key.public, public, secret,
            )  # fmt: skip

        self._ask(set_up)

    def with_the_key_of_other_nodes(self):
        other = NodeKey(*zmq.curve_keypair())

        def set_up(one):
            one.curve_serverkey, one.curve_publickey, one.curve_secretkey = (
                other.public, other.public, other.secret,
            )  # fmt: skip

        self._ask(set_up)

    def _ask(self, set_up):
        """Introduce itself as a second server, and ask what is kept: nothing may come back."""
        failed = zmq.Event.DISCONNECTED | zmq.Event.HANDSHAKE_FAILED_AUTH
        with zmq.Context() as context, context.socket(zmq.DEALER) as one:
            one.linger = 0
            set_up(one)
            with one.get_monitor_socket(failed) as monitor:
                one.connect(f"tcp://127.0.0.1:{self.port}")
                with contextlib.suppress(zmq.Again):  # it may be refused by now
                    one.send_multipart(pack("server"), zmq.NOBLOCK)
                    query = pack("query", number=1, query="info", values={})
                    one.send_multipart(query, zmq.NOBLOCK)
                assert monitor.poll(DEADLINE_S * 1000), "the connection stays"
                assert not one.poll(0), "it was answered"
                one.disable_monitor()


@pytest.mark.parametrize(
    "how", ["without_a_key", "with_a_key_of_its_own", "with_the_key_of_other_nodes"]
)
def test_a_stranger_is_refused_and_logged_and_counted(how, port, proxy, key, key_file, capfd):
    with over_tcp(port, proxy, key_file).running() as deployment:
        getattr(Stranger(port, key), how)()
        wait_until(lambda: sample(deployment, "moescope_links_refused_total"), "it is counted")
        deployment.complete("a")
        assert fetch(deployment, "cmpl-a")["complete"]
    assert capfd.readouterr().err.count("refused a connection to tcp://127.0.0.1") == 1


def test_another_protocol_is_cut_off(deployment, port):
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as one:
        one.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(100))
        with contextlib.suppress(ConnectionError):
            while one.recv(1000):  # until it is closed
                pass
    deployment.complete("a")
    assert fetch(deployment, "cmpl-a")["complete"]


def test_a_frame_that_is_too_large_is_cut_off(deployment, port, key):
    """Whoever has the key may be broken."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as one:
        one.linger = 0
        with one.get_monitor_socket(zmq.Event.DISCONNECTED) as monitor:
            Address(f"tcp://127.0.0.1:{port}", key).connect(one)
            one.send(bytes(addresses.MAX_FRAME_BYTES + 1))
            assert monitor.poll(DEADLINE_S * 1000), "the connection stays"
            one.disable_monitor()
    deployment.complete("a")
    assert fetch(deployment, "cmpl-a")["complete"]


def test_nobody_is_let_in_where_nobody_looks_at_keys(key):
    """The thread that does may have ended: whose key is the collector's own is refused, too."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        Address("tcp://127.0.0.1:*", key).bind(router)
        port = int(router.last_endpoint.rsplit(b":", 1)[1])
        Stranger(port, key).with_a_key_of_its_own()
        assert not router.poll(0)


def listen(key, pipe):
    """Listen as a collector does, and hear of nobody until told to end."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        with listening(context, router, Address("tcp://127.0.0.1:*", key)):
            pipe.send(int(router.last_endpoint.rsplit(b":", 1)[1]))
            pipe.recv()


def connect_in_vain(where, count):
    """Connect without a key, so often; TimeoutError where nobody says no."""
    greeting = b"\xff" + bytes(8) + b"\x7f\3\1" + b"NULL".ljust(20, b"\0") + bytes(32)
    for _ in range(count):
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(where, timeout=DEADLINE_S) as one,
        ):
            one.settimeout(0.5)
            one.sendall(greeting)
            while one.recv(1000):  # until it is closed
                pass


def test_strangers_by_the_thousand_do_not_hold_up_the_end(key):
    """More than ZMQ queues events: its thread then waits until they are taken."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=listen, args=[key, theirs], daemon=True)
    process.start()
    try:
        assert ours.poll(DEADLINE_S)
        where = "127.0.0.1", ours.recv()
        with pytest.raises(TimeoutError):  # ZMQ's thread waits
            connect_in_vain(where, 4000)
        ours.send(None)
        process.join(DEADLINE_S)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join(DEADLINE_S)


@pytest.mark.parametrize("is_encrypted", [True, False])
def test_no_token_passes_in_clear(is_encrypted, key):
    """Without the key they do: what is looked for would be found."""
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as router,
        contextlib.ExitStack() as stack,
    ):
        router.linger = 0
        address = Address("tcp://127.0.0.1:*", key if is_encrypted else None)
        if is_encrypted:
            stack.enter_context(listening(context, router, address))
        else:
            address.bind(router)
        port = int(router.last_endpoint.rsplit(b":", 1)[1])
        with TcpProxy(("127.0.0.1", port), is_recording=True) as proxy:
            near = dataclasses.replace(address, url=f"tcp://127.0.0.1:{proxy.port}")
            client = CollectorClient(near)
            register = {"internal_id": "a-i", "request_id": "a", "created_s": 0.0}
            client.tell("register", [TOKENS], **register)
            while True:  # its introduction comes first
                assert router.poll(DEADLINE_S * 1000), "no message came"
                if router.recv_multipart()[-1] == TOKENS.tobytes():
                    break
            client.close()
            assert (TOKENS.tobytes() in proxy.recorded) is not is_encrypted
            assert (b"request_id" in proxy.recorded) is not is_encrypted


def test_a_link_that_is_cut_costs_rows_with_their_cause_and_recovers(deployment, proxy):
    engine, frontend = deployment.engine, deployment.frontend
    (running_id,), (ended_id,) = frontend.add("running"), frontend.add("ended")
    running, ended = engine.start(running_id), engine.start(ended_id)
    wait_until(lambda: sample(deployment, "moescope_steps_total") == 2, "both steps arrived")
    proxy.cut()
    wait_until(lambda: link(deployment).is_away, "the worker notices")
    for _ in range(5):
        engine.step([(running, 1)])
    frontend.put(ended_id, [1], FinishReason.STOP)
    engine.step([(running, 1)], finished=[ended])
    proxy.mend()
    wait_until(lambda: not link(deployment).is_away, "it is back")
    engine.step([(running, 1)])
    frontend.put(running_id, [1] * 8, FinishReason.STOP)
    engine.step(finished=[running])
    trace = fetch(deployment, "running")
    assert not trace["complete"]
    assert trace["source"] == ["missing"] * 11 + ["computed"]
    assert not fetch(deployment, "ended")["complete"]
    assert causes(deployment) == {"link_broken": 11 + 5}
    assert sample(deployment, "moescope_step_gaps_total") == 1
    deployment.complete("after")
    assert fetch(deployment, "cmpl-after")["complete"]


def test_a_link_that_stalls_is_found_by_its_heartbeats(port, proxy, key_file, monkeypatch):
    monkeypatch.setattr(addresses, "HEARTBEAT_MS", 50)
    monkeypatch.setattr(addresses, "HEARTBEAT_TIMEOUT_MS", 500)
    with over_tcp(port, proxy, key_file).running() as deployment:
        proxy.stall()
        wait_until(lambda: link(deployment).is_away, "the worker notices")
        proxy.mend()
        wait_until(lambda: not link(deployment).is_away, "it is back")
        deployment.complete("after")
        assert fetch(deployment, "cmpl-after")["complete"]


def test_a_stage_s_link_costs_the_rows_of_its_layers(port, proxy, key_file):
    """A sequence that ended meanwhile has its trace once the stage is back, and keeps its cause."""
    first, second = (
        dataclasses.replace(SPEC, num_stages=2, stage=n, layers=[n], expert_bytes=[1])
        for n in range(2)
    )
    only = slice(0, 1)

    def rows_of_one(start, count):
        ids, weights = rows_of(start, count)
        return ids[:, only], weights[:, only]

    near = Address(f"tcp://127.0.0.1:{port}", read_key(key_file))
    other = Engine(through(proxy, key_file), second, rows_of=rows_of_one)
    flags = {"spec": first, "rows_of": rows_of_one, "worker_address": near}
    with (
        contextlib.closing(other.recorder),
        over_tcp(port, proxy, key_file, **flags).running() as deployment,
    ):
        engines = deployment.engine, other
        (name,) = deployment.frontend.add("a")
        running = [engine.start(name) for engine in engines]
        wait_until(lambda: sample(deployment, "moescope_steps_total") == 1, "the steps arrived")
        proxy.cut()
        wait_until(lambda: other.recorder._link.is_away, "the second stage notices")
        deployment.frontend.put(name, [1], FinishReason.STOP)
        for engine, one in zip(engines, running, strict=True):
            engine.step(finished=[one])
        proxy.mend()
        trace = fetch(deployment, "a")
        assert not trace["complete"]
        assert causes(deployment) == {"link_broken": 5}


def test_what_an_api_server_sent_just_before_its_link_broke_is_told_again(port, proxy, key_file):
    """It left the server and never arrived: without it the request would not be found."""
    near = Address(f"tcp://127.0.0.1:{port}", read_key(key_file))
    with over_tcp(port, proxy, key_file, worker_address=near).running() as deployment:
        client = CollectorClient(through(proxy, key_file))
        client.ask_and_wait(InfoQuery())  # it is connected
        proxy.stall()
        register = make_register("a")
        client.tell("register", [TOKENS], **dataclasses.asdict(register))
        client.tell("finish", [TOKENS[:1]], internal_id=register.internal_id, reason="stop")
        journal = client._outbox.journal
        wait_until(lambda: not journal.has_unsent, "all is sent")
        assert deployment.http.get("/routes/a").status_code == 404
        proxy.cut()
        proxy.mend()
        running = deployment.engine.start(register.internal_id, TOKENS.tolist())
        deployment.engine.step(finished=[running])
        wait_until(lambda: deployment.http.get("/routes/a").status_code != 404, "it is told again")
        assert fetch(deployment, "a")["complete"]
        wait_until(lambda: len(journal) == 0, "the API server forgets it")
        client.close()


def make_register(name):
    return Register(
        internal_id=f"{name}-i", request_id=name, ids=[name], index=0, model="tiny", lora=None,
        prompt_len=len(TOKENS), created_s=1.0, keep=True,
    )  # fmt: skip
