"""Imports point one way: capture -> messages <- collector <- api; the client knows no service."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service" / "moescope_service"

FORBIDDEN = {
    SERVICE / "capture": ("moescope_service.api", "moescope_service.collector", "fastapi"),
    SERVICE / "collector": (
        *("moescope_service.api", "moescope_service.capture", "fastapi"),
        *("torch", "vllm", "prometheus_client"),
    ),
    SERVICE / "api": ("moescope_service.capture", "torch"),
    ROOT / "client" / "moescope": ("torch", "vllm", "fastapi", "zmq", "prometheus_client"),
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("package", FORBIDDEN, ids=lambda path: path.name)
def test_imports_point_one_way(package: Path) -> None:
    files = sorted(package.rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            assert not name.startswith(FORBIDDEN[package]), f"{path} imports {name}"


def test_only_the_service_lookup_names_the_service() -> None:
    users = {
        path.name
        for path in (ROOT / "client" / "moescope").rglob("*.py")
        if any(name.startswith("moescope_service") for name in imports(path))
    }
    assert not users
