"""Arms side by side, in turn, or not at all."""

import dataclasses
import sys

import httpx
import pytest

from moescope import CommandError
from moescope.overhead import arms, hosting
from moescope.overhead.arms import Arm
from moescope.run_dir import RunDir
from tests.groups import commands, is_suspended, runs
from tests.waiting import wait_until

SERVE = """
import signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])
def end(*_):
    print("ended", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, end)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def launch(tmp_path):
    (tmp_path / "serve.py").write_text(SERVE)
    told = []
    launcher = hosting.Launcher(
        model=arms.Model(path="", served_name=""),
        run_dir=RunDir(tmp_path),
        timeout_s=60.0,
        tell=told.append,
    )
    serve = f"{sys.executable} -S {tmp_path / 'serve.py'} {{port}}"
    dying = f"{sys.executable} -S -c raise(SystemExit('no_such_flag')) {{port}}"

    def go(placement, *, free_memory=hosting.available_memory, suspends_idle=True, **commands):
        every = [
            Arm(name=name, command=serve if command == "serve" else dying)
            for name, command in commands.items()
        ]
        return hosting.start_arms(
            dataclasses.replace(launcher, free_memory=free_memory, suspends_idle=suspends_idle),
            every,
            placement,
        )

    go.told = told
    return go


def answers(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_arms_run_side_by_side_and_end(launch):
    with launch("auto", a="serve", b="serve") as started:
        assert started.arrangement.stays_up
        urls = []
        for name in started.names:
            with started.arrangement.visit(name) as url:
                assert answers(url)
                urls.append(url)
        assert len(set(urls)) == 2
    assert not any(map(answers, urls))


def test_arms_that_are_not_visited_are_suspended_with_all_their_processes(launch):
    with launch("together", a="serve", b="serve") as started:
        a, b = (started.arrangement.suspended[name] for name in started.names)
        assert len(commands(a)) == 2  # it and its child
        assert is_suspended(a)
        assert is_suspended(b)
        with started.arrangement.visit("a") as url:
            assert answers(url)
            assert not is_suspended(a)
            assert is_suspended(b)
        with pytest.raises(KeyboardInterrupt), started.arrangement.visit("b"):
            raise KeyboardInterrupt
        assert is_suspended(a)
        assert is_suspended(b)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, CommandError])
def test_whatever_ends_a_measurement_ends_suspended_servers(launch, error):
    suspended = []

    def measure():
        with launch("together", a="serve", b="serve") as started:
            suspended.extend(started.arrangement.suspended.values())
            with started.arrangement.visit("a"):
                raise error

    with pytest.raises(error):
        measure()
    assert len(suspended) == 2
    wait_until(lambda: not any(map(runs, suspended)), "all processes have ended")
    # They were continued first: SIGTERM ended them in order, and no SIGKILL.
    assert [server.log.read_text().split() for server in suspended] == [["ended"]] * 2


def test_servers_that_do_not_share_cores_are_not_suspended(launch):
    with launch("together", suspends_idle=False, a="serve", b="serve") as started:
        assert all(answers(url) for url in started.arrangement.urls.values())


def test_arms_in_turn_are_up_one_at_a_time(launch):
    with launch("in-turn", a="serve", b="serve") as started:
        assert not started.arrangement.stays_up
        with started.arrangement.visit("a") as first:
            assert answers(first)
        assert not answers(first)
        with started.arrangement.visit("b") as second:
            assert answers(second)


def test_memory_that_is_short_makes_them_run_in_turn(launch):
    free = iter([{"host": 100}, {"host": 40}])
    with launch("auto", free_memory=lambda: next(free), a="serve", b="serve") as started:
        assert not started.arrangement.stays_up
    assert "in turn" in launch.told[-1]


def test_an_arm_that_does_not_start_is_left_out_and_told(launch):
    with launch("together", a="serve", b="dying", c="serve") as started:
        assert started.names == ["a", "c"]
        assert "no_such_flag" in started.refused["b"]
    assert any("left out: b" in line for line in launch.told)


@pytest.mark.parametrize("commands", [{"a": "dying", "b": "serve"}, {"a": "serve", "b": "dying"}])
def test_without_the_first_arm_or_any_other_there_is_nothing_to_compare(launch, commands):
    with pytest.raises(CommandError, match="no_such_flag"), launch("together", **commands):
        pass


def test_vllms_refusal_of_its_own_capture_is_told_clearly(tmp_path):
    log = tmp_path / "log"
    log.write_text("Value error, AuxOutput Connector requires Model Runner V2; set VLLM_…\n")
    error = CommandError("the routed-experts server ended with status 1")
    assert "the CPU has none" in hosting.refusal("routed-experts", error, log)
    assert "status 1" in hosting.refusal("other", error, log)


def test_memory_fits_or_not():
    assert hosting.fits({"host": 100, "gpu 0": 80}, {"host": 70, "gpu 0": 70}, 1)
    assert not hosting.fits({"host": 100, "gpu 0": 80}, {"host": 90, "gpu 0": 40}, 1)
    assert not hosting.fits({"host": 100}, {"host": 70}, 2)
    assert hosting.fits({"host": 100}, {"host": 0}, 0)
    assert hosting.available_memory()["host"] > 0
