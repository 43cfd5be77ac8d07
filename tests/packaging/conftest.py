"""The wheel and the sdist, built once as a release builds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from packages import ROOT, build


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    build(ROOT, directory, "wheel", "sdist")
    return directory


@pytest.fixture(scope="session")
def wheel_path(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist_path(dist: Path) -> Path:
    (path,) = dist.glob("*.tar.gz")
    return path
