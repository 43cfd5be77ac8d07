"""What the GPU measurement is asked for: arms and parts, and what it refuses at once."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import pytest

from benchmarks.gpu import measure, one_server, options
from benchmarks.gpu.one_server import DETACHED
from moescope.overhead.arms import COUNTS, MOESCOPE, STOCK, Arm, Model
from moescope.overhead.hosting import StartedArms

IN_ONE = ("--part", "throughput", "--placement", "one-server")


def parse(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["measure", "--model", "m", "--out", "o.json", *flags])
    return options.parse()


def test_one_server_has_arms_of_its_own(monkeypatch):
    assert parse(monkeypatch, *IN_ONE).arm == one_server.DEFAULT
    assert parse(monkeypatch, *IN_ONE, "--arm", DETACHED, "--arm", COUNTS).arm == [DETACHED, COUNTS]
    assert parse(monkeypatch, "--arm", STOCK, "--arm", COUNTS).arm == [STOCK, COUNTS]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--part throughput --arm stock", "--arm: two or more of stock"),
        ("--part throughput --arm detached --arm moescope", "--arm: two or more of stock"),
        ("--part throughput --placement one-server --arm detached --arm stock",
         "--arm: two or more of detached"),
        ("--part throughput --placement one-server --arm detached --arm detached",
         "--arm: two or more of detached"),
        ("--part throughput --placement one-server --arm detached --arm counts --arm moescope",
         "take counts without the rest"),
        ("--part throughput --placement one-server --arm detached --arm counts --arm paused",
         "take counts without the rest"),
        ("--placement one-server", "--placement one-server is one of --part throughput alone"),
        ("--placement one-server --part kernels",
         "--placement one-server is one of --part throughput alone"),
        ("--placement one-server --part stock_routing",
         "--placement one-server is one of --part throughput alone"),
        ("--part throughput --stream-interval 0", "--stream-interval: 1 or more"),
        ("--part kernels --stream-interval 10", "of --part throughput alone"),
        ("--stream-interval 10", "of --part throughput alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(flags, wanted, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, *flags.split())
    assert wanted in capsys.readouterr().err


def test_an_arm_that_does_not_start_is_not_profiled(tmp_path, monkeypatch):
    visited = []
    ready = StartedArms(
        arms=[Arm(name=STOCK), Arm(name=MOESCOPE)],
        arrangement=SimpleNamespace(visit=contextlib.nullcontext),
        refused={COUNTS: "no room"},
    )
    monkeypatch.setattr(
        measure.hosting,
        "start_arms",
        lambda start, chosen, placement: contextlib.nullcontext(ready),
    )
    monkeypatch.setattr(
        measure, "launcher", lambda *_: SimpleNamespace(model=Model(path="m", served_name="m"))
    )
    monkeypatch.setattr(measure.arms, "prepare", lambda arm, url, key: visited.append(arm.name))
    monkeypatch.setattr(measure.arms, "check", lambda arm, url, key: None)

    def visit_each(loads, arrangement, names, *, hooks, **_):
        for name in names:
            with arrangement.visit(name) as url:
                hooks.on_visit(name, url)
        return ()

    monkeypatch.setattr(measure.kernels.rounds, "measure", visit_each)
    monkeypatch.setattr(measure.kernels, "statements", lambda found: ())
    args = parse(monkeypatch, "--arm", STOCK, "--arm", MOESCOPE, "--arm", COUNTS)
    args.tap_directory = tmp_path
    found = measure.run_kernels(args)
    assert visited == [STOCK, MOESCOPE]
    assert found["refused"] == {COUNTS: "no room"}
