"""What the sdist holds: what the wheel is built from and what the tests need, and no results."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packages import ROOT, build

MAX_BYTES = 10_000_000
RESULTS = ("benchmarks/results/", "client/examples/", "tests/fidelity/results/", "runs/")
LOCAL = (".git/", ".venv", "docker/secrets/", "shared/")


@pytest.fixture(scope="module")
def tree(sdist_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory that the sdist unpacks to."""
    directory = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist_path) as archive:
        archive.extractall(directory, filter="data")
    (unpacked,) = directory.iterdir()
    return unpacked


def files(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}


def test_it_is_small(sdist_path: Path) -> None:
    assert sdist_path.stat().st_size < MAX_BYTES


def test_it_holds_code_tests_and_documents_and_no_results(tree: Path) -> None:
    names = files(tree)
    top = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"}
    assert top <= names
    assert not [name for name in names if name.startswith((*RESULTS, *LOCAL))]
    for directory in (
        "benchmarks",
        "client",
        "dashboards",
        "docs",
        "requirements",
        "service",
        "tests",
    ):
        written = {
            str(path.relative_to(ROOT))
            for path in (ROOT / directory).rglob("*")
            if path.suffix in {".py", ".md", ".in", ".txt", ".json", ".html", ".css", ".js"}
            and ".venv" not in path.parts
        }
        lacking = {name for name in written - names if not name.startswith(RESULTS)}
        assert not lacking, lacking


def test_the_wheel_built_from_it_is_the_tree_s(
    tree: Path, wheel_path: Path, tmp_path: Path
) -> None:
    build(tree, tmp_path, "wheel")
    (rebuilt,) = tmp_path.glob("*.whl")
    assert rebuilt.name == wheel_path.name
    assert contents(rebuilt) == contents(wheel_path)


def contents(wheel: Path) -> dict[str, int]:
    """Return the checksum of every file of a wheel by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


@pytest.mark.parametrize("tests", [["tests/unit"], ["tests/packaging", "tests/docs"]])
def test_its_tests_find_what_they_import_and_read(tests: list[str], tree: Path) -> None:
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tree, env={**os.environ, "PYTHONPATH": f"{tree / 'client'}:{tree / 'service'}"},
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert collected.returncode == 0, collected.stdout
