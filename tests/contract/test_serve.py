"""The command line of ``moescope serve``."""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace

import pytest

from moescope_service import serve, settings
from moescope_service.errors import RefusedError


@pytest.mark.parametrize(
    "flags",
    [
        ["--routes-allow-untested-vllm", "on"],
        ["--routes_allow_untested_vllm", "on"],
        ["--routes_allow_untested_vllm=on"],
    ],
)
def test_our_flags_are_read_as_vllm_reads_them(flags, monkeypatch):
    monkeypatch.setenv(settings.variable("allow_untested_vllm"), "off")  # and undone afterwards
    argv = ["model", "--max-model-len", "64", *flags, "--served-model-name", "a_b"]
    assert serve._export_ours(argv).allows_untested_vllm


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "it is not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "missing" / "log", "No such file or directory"),
    ):
        with pytest.raises(RefusedError, match=f"^--routes-log: cannot write {path}: {why}$"):
            serve._check_log(settings.Settings(log=path))


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["model", "--help"]])
def test_help_shows_our_flags_with_one_default_each_and_how_to_see_vllms(argv, capsys):
    assert serve.main(argv) == 0
    told = capsys.readouterr().out
    ours = [
        settings.flag(field.metadata["name"]) for field in dataclasses.fields(settings.Settings)
    ]
    assert " ".join(told.split()).count("(default: ") == len(ours)
    places = [told.index(f"  {flag} ") for flag in ours]
    assert places == sorted(places)
    assert places[-1] < told.index("--help=all")
    assert "--max-num-seqs" not in told


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({}, "http://localhost:8000/moescope"),
        ({"host": "0.0.0.0"}, "http://localhost:8000/moescope"),
        ({"host": "::1"}, "http://[::1]:8000/moescope"),
        ({"host": "box", "port": 8443, "ssl_certfile": "c"}, "https://box:8443/moescope"),
        ({"root_path": "/moe"}, "http://localhost:8000/moe/moescope"),
    ],
)
def test_the_page_s_address(given, address):
    args = {"host": None, "port": 8000, "ssl_certfile": None, "root_path": None, **given}
    assert serve._page(Namespace(**args)) == address
