"""The vLLM versions that moescope supports and was tested on, and what is installed."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from packaging.specifiers import SpecifierSet

import moescope

SUPPORTED_VLLM = SpecifierSet(">=0.30,<0.34", prereleases=True)
"""Versions whose internals were read; ``pyproject.toml`` says the same."""
EVIDENCE = Path(__file__).with_name("evidence.json")
"""What passed on which version, and when: written by ``make test-versions``."""
STAGES = ("contract", "serving", "fidelity")
"""What a version has to pass: the app and the recorder around vLLM's own classes, real servers, and
every row against HF transformers."""


PINNED_VLLM = "0.32.0"
"""The version of ``requirements/cpu.txt``, on which continuous integration runs every test."""


def tested_versions() -> list[str]:
    """Return `PINNED_VLLM` and the versions on which all of `STAGES` passed, in ascending order."""
    runs = json.loads(EVIDENCE.read_text())
    passed = {run["vllm"] for run in runs if set(STAGES) <= run["stages"].keys()}
    return sorted({PINNED_VLLM} | passed)


def vllm_version() -> str:
    """Return the installed vLLM's version; its CPU build is not distributed as ``vllm``."""
    import vllm

    return str(vllm.__version__).split("+")[0]


def versions() -> dict[str, str]:
    """Return the versions that every trace carries."""
    return {
        "moescope": moescope.__version__,
        "vllm": vllm_version(),
        "torch": importlib.metadata.version("torch"),
    }
