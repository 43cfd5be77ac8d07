"""The thread that carries messages never blocks and never holds more than it may."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import statistics
import threading
import time

import pytest
import zmq

from moescope_service.link import SOCKET_QUEUE, Link, cores_of_parent
from moescope_service.messages import MESSAGE_BYTES
from tests.waiting import DEADLINE_S, wait_until


@dataclasses.dataclass
class Message:
    body: bytes
    encoded_in: list[str] = dataclasses.field(default_factory=list)

    @property
    def size_bytes(self):
        return len(self.body)

    def encode(self):
        self.encoded_in.append(threading.current_thread().name)
        return [self.body]


def one_by_one(messages):
    (message,) = messages
    return [message.encode()]


@pytest.fixture
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("z") / "s"
    assert len(str(path)) < 100, "too long for a socket"
    return f"ipc://{path}"


@pytest.fixture
def router(address):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        yield socket


def receive(router):
    assert router.poll(DEADLINE_S * 1000), "no message came"
    return router.recv_multipart()


def seconds(call):
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def make_link(
    address, on_message=lambda frames: None, max_bytes=2**20, encode=one_by_one, **options
):
    return Link(address, on_message, max_bytes=max_bytes, name="a-link", encode=encode, **options)


def test_messages_arrive_in_order_and_answers_come_back(address, router):
    got, arrived = [], threading.Event()

    def on_message(frames):
        got.append(frames)
        arrived.set()

    link = make_link(address, on_message)
    messages = [Message(bytes([number])) for number in range(100)]
    for message in messages:
        link.put(message)
    received = [receive(router) for _ in messages]
    assert [body for _, body in received] == [message.body for message in messages]
    assert {name for message in messages for name in message.encoded_in} == {"a-link"}
    router.send_multipart([received[0][0], b"answer"])
    assert arrived.wait(DEADLINE_S)
    assert got == [[b"answer"]]
    wait_until(lambda: link.waiting_bytes == 0, "nothing waits")
    link.close()


def test_what_waits_is_sent_once_somebody_listens(address):
    link = make_link(address)
    for number in range(200):
        link.put(Message(b"%d" % number))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(address)
        assert [receive(socket)[1] for _ in range(200)] == [b"%d" % n for n in range(200)]
    link.close()


def test_put_does_not_block_and_gives_up_beyond_its_bytes(address, caplog):
    link = make_link(address, max_bytes=1000 * 100)
    with caplog.at_level(logging.ERROR, "moescope.link"):
        took_s = [seconds(lambda: link.put(Message(bytes(1000)))) for _ in range(500)]
    assert statistics.quantiles(took_s, n=5)[-1] < 0.01  # four in five: others may take the core
    assert caplog.text.count("given up") == 1
    assert link.waiting_bytes <= 1000 * 101
    kept = 500 - link.num_given_up
    assert 100 <= kept <= 101 + SOCKET_QUEUE
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(address)
        for _ in range(kept):
            receive(socket)
        link.put(Message(b"after"))
        assert receive(socket)[1] == b"after"
    link.close()


def test_close_sends_what_waits(address, router):
    link = make_link(address)
    for _ in range(50):
        link.put(Message(b"x"))
    link.close(timeout_s=DEADLINE_S)
    assert not link._thread.is_alive()
    assert [receive(router)[1] for _ in range(50)] == [b"x"] * 50


def test_close_gives_what_zmq_holds_its_time_too(address):
    """More than lies in the sockets' own buffers, and more slowly than ZMQ lingers by itself."""
    body, count = bytes(2**20), SOCKET_QUEUE // 2
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger, router.rcvhwm = 0, 1
        router.bind(address)
        link = make_link(address, max_bytes=2 * count * len(body))
        for _ in range(count):
            link.put(Message(body))
        closing = threading.Thread(target=link.close, args=[DEADLINE_S])
        closing.start()
        time.sleep(1.5)  # longer than 0.6 s
        for _ in range(count):
            assert len(receive(router)[1]) == len(body)
        closing.join(DEADLINE_S)
        assert not closing.is_alive()


def test_close_without_a_listener_takes_no_longer_than_told(address):
    def close():
        link = make_link(address)
        for _ in range(50):
            link.put(Message(b"x"))
        took_s = seconds(lambda: link.close(timeout_s=0.1))
        link._thread.join(DEADLINE_S)
        assert not link._thread.is_alive()
        assert not link.put(Message(b"x"))
        return took_s

    assert min(close() for _ in range(5)) < 1.0


def test_close_waits_no_longer_for_one_that_hangs(address, router):
    """It is connected and reads nothing: its queue and the socket's are full."""
    link = make_link(address, max_bytes=2**30)
    link.put(Message(b"x"))
    receive(router)
    for _ in range(200):
        link.put(Message(bytes(2**20)))
    link.close(timeout_s=0.1)
    link._thread.join(DEADLINE_S)
    assert not link._thread.is_alive()


@pytest.fixture
def cores():
    """Those of this process, at least two; the test's thread is bound to the first of them."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("this process may run on one core alone")
    os.sched_setaffinity(0, {min(cores)})
    yield cores
    os.sched_setaffinity(0, cores)


def test_its_thread_runs_where_it_was_made_unless_told_otherwise(address, router, cores):
    for given, want in ((None, {min(cores)}), (cores, cores)):
        link = make_link(address, cores=given)
        link.put(Message(b"x"))
        receive(router)
        assert os.sched_getaffinity(link._thread.native_id) == want
        link.close()


def test_the_cores_of_the_process_that_started_this_one(cores):
    """A worker is bound by vLLM, its parent is not; nobody escapes the first process' `taskset`."""
    assert cores_of_parent() is None
    os.sched_setaffinity(0, cores)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, os.sched_setaffinity, (0, {min(cores)})) as worker:
        assert worker.apply(os.sched_getaffinity, (0,)) == {min(cores)}
        assert worker.apply(cores_of_parent) == cores


def test_an_error_in_one_message_does_not_end_the_link(address, router, caplog):
    """Otherwise everything after it would wait for ever, in memory."""

    class Broken(Message):
        def encode(self):
            raise KeyError("no such request")

    link = make_link(address)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda args: None)
        link.put(Broken(b"x"))
        link.put(Message(b"after"))
        assert receive(router)[1] == b"after"
    link.close()


def test_messages_of_one_type_that_wait_are_joined(address):
    class Other(Message):
        pass

    link = make_link(
        address, encode=lambda messages: [[b"+".join(one.body for one in messages)]], join=True
    )
    bodies = [*(Message(b"%d" % n) for n in range(3)), Other(b"x"), Message(b"3"), Message(b"4")]
    bodies += [Message(bytes(MESSAGE_BYTES)), Message(bytes(20))]
    link._waiting.extend(bodies)  # all at once, whenever the thread wakes
    link._added_bytes += sum(one.size_bytes for one in bodies)
    link._wake()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(address)
        received = [receive(socket)[1] for _ in range(5)]
    assert received[:3] == [b"0+1+2", b"x", b"3+4"]
    assert [len(body) for body in received[-2:]] == [MESSAGE_BYTES, 20]
    assert link.waiting_bytes == 0
    link.close()


def test_what_becomes_several_messages_arrives_in_order(address, router):
    def encode(messages):
        (message,) = messages
        return [[message.body, b"%d" % number] for number in range(2 * SOCKET_QUEUE)]

    link = make_link(address, encode=encode)
    link.put(Message(b"a"))
    link.put(Message(b"b"))
    received = [receive(router)[1:] for _ in range(4 * SOCKET_QUEUE)]
    assert received == [[name, b"%d" % number] for name in (b"a", b"b")
                        for number in range(2 * SOCKET_QUEUE)]  # fmt: skip
    link.close()
