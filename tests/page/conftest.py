"""Chromium, and a deployment without a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.contract.conftest import deployment, fresh

from .browser import Page, chromium

__all__ = ["deployment", "fresh"]


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Page]]:
    """Opens a new tab."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium: apt-get install chromium")
    with chromium(program, tmp_path_factory.mktemp("chromium") / "profile") as open_tab:
        yield open_tab


@pytest.fixture
def page(tab: Callable[[], Page]) -> Iterator[Page]:
    """A tab of the test's own, whose log has to be clean at the end."""
    opened = tab()
    opened.look(1280, 800, "light")
    yield opened
    assert opened.problems == []
    assert all(host.startswith("127.0.0.1:") for host in opened.hosts), opened.hosts
    opened.close()
