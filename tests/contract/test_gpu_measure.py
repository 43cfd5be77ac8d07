"""What the GPU measurement refuses before it starts a server."""

from __future__ import annotations

import sys

import pytest

from tests.gpu import measure


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--part throughput --stream-interval 0", "--stream-interval: 1 or more"),
        ("--part kernels --stream-interval 10", "of --part throughput alone"),
        ("--stream-interval 10", "of --part throughput alone"),
        ("--part kernels --placement one-server", "--placement one-server is one of"),
        ("--part throughput --arm detached --arm moescope", "--arm: two or more of stock"),
        ("--part throughput --arm stock", "--arm: two or more of stock"),
        ("--part throughput --placement one-server --arm detached --arm counts --arm paused",
         "take counts without the rest"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(flags, wanted, monkeypatch, capsys):
    argv = ["measure", "--model", "m", "--out", "x.json", *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        measure.parse()
    assert wanted in capsys.readouterr().err
