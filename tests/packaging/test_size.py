"""What is committed stays small: summaries, no raw results."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results/"
ALL_BYTES, RESULTS_BYTES, RESULT_BYTES, PICTURE_BYTES = 6_000_000, 500_000, 64 * 1024, 200_000
LEFT_OUT = ("service/moescope_service/bundled_model/checkpoint/",)


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """Bytes of every tracked file that is there, by its path."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no clone, or no git")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return {str(path.relative_to(ROOT)): path.stat().st_size for path in paths if path.is_file()}


def is_counted(name: str) -> bool:
    locked = name.startswith("requirements/") and name.endswith(".txt")
    return not name.startswith(LEFT_OUT) and not locked


def test_all_files_but_the_model_and_locked_versions_are_six_megabytes(sizes) -> None:
    counted = {name: size for name, size in sizes.items() if is_counted(name)}
    largest = sorted(counted.items(), key=lambda item: -item[1])[:5]
    assert sum(counted.values()) <= ALL_BYTES, f"the largest are {largest}"


def test_all_results_are_less_than_half_a_megabyte(sizes) -> None:
    results = {name: size for name, size in sizes.items() if name.startswith(RESULTS)}
    assert sum(results.values()) <= RESULTS_BYTES, "summaries stay few: replace what is outdated"


def test_results_are_summaries(sizes) -> None:
    results = {name: size for name, size in sizes.items() if name.startswith(RESULTS)}
    assert results
    for name, size in results.items():
        limit = PICTURE_BYTES if name.endswith(".png") else RESULT_BYTES
        assert size <= limit, f"{name} has {size} bytes: python -m benchmarks.summarize"
