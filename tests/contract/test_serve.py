"""The command line of ``moescope serve``."""

from __future__ import annotations

import pytest

from moescope_service import serve, settings


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
    assert serve._export_ours(argv).allow_untested_vllm == "on"
