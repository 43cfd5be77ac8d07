"""Processes are told apart, also from later ones that have their number."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from moescope_service.processes import Process
from tests.waiting import DEADLINE_S

SAYS = """
import sys
from moescope_service.processes import Process
print(Process.current(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def another() -> Iterator[Process]:
    """A process that runs until the end of the block, and is no zombie afterwards."""
    command = [sys.executable, "-P", "-c", SAYS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one:
        try:
            assert one.stdout is not None
            process = Process.parse(one.stdout.readline())
            assert process is not None
            assert process.pid == one.pid
            yield process
        finally:
            one.communicate(timeout=DEADLINE_S)


def test_this_one_is_alive_and_survives_the_wire():
    process = Process.current()
    assert (process.pid, process.is_alive, process.is_dead) == (os.getpid(), True, False)
    assert Process.parse(str(process)) == process


def test_another_one_is_dead_after_its_end():
    with another() as process:
        assert process.is_alive
        assert not process.is_dead
    assert process.is_dead
    assert not process.is_alive


def test_a_later_process_of_that_number_is_another_one():
    later = dataclasses.replace(Process.current(), start_ticks=1)
    assert later.is_dead
    assert not later.is_alive


def test_of_another_container_neither_can_be_told():
    elsewhere = dataclasses.replace(Process.current(), pid=2**22, world="elsewhere")
    assert not elsewhere.is_alive
    assert not elsewhere.is_dead


@pytest.mark.parametrize("text", ["", "1", "1 2", "a 2 b", "1 2 3 4"])
def test_what_is_no_process(text):
    assert Process.parse(text) is None


def is_ancestor(process: Process) -> bool:
    return process.is_ancestor


def test_who_started_this_one_is_an_ancestor():
    me = Process.current()
    assert me.is_ancestor
    with another() as process:
        assert not process.is_ancestor
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(is_ancestor, [me])
