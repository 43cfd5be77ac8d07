"""Imports point one way: capture -> messages <- collector <- api; the client knows no service."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service" / "moescope_service"

HTTP = ("fastapi", "starlette", "uvicorn", "httpx", "prometheus_client")
FORBIDDEN = {
    SERVICE / "capture": ("moescope_service.api", "moescope_service.collector", "fastapi"),
    SERVICE / "collector": (
        *("moescope_service.api", "moescope_service.capture", "fastapi"),
        *("torch", "vllm", "prometheus_client"),
    ),
    SERVICE / "api": ("moescope_service.capture", "moescope_service.collector", "torch"),
    SERVICE / "frontend": (
        *("moescope_service.api", "moescope_service.capture", "moescope_service.collector"),
        *HTTP,
    ),
    SERVICE / "offline.py": ("moescope_service.api", *HTTP),
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


OUTSIDE = ("service", "tests", "benchmarks", "dashboards", "docs")
"""Folders beside client/; one that does not exist has no files."""


@pytest.mark.parametrize("package", FORBIDDEN, ids=lambda path: path.name)
def test_imports_point_one_way(package: Path) -> None:
    files = sorted(package.rglob("*.py")) if package.is_dir() else [package]
    assert files
    for path in files:
        for name in imports(path):
            assert not name.startswith(FORBIDDEN[package]), f"{path} imports {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even for types: what two modules share has a module of its own."""
    graph = {}
    for root in (SERVICE, ROOT / "client" / "moescope"):
        for path in root.rglob("*.py"):
            name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
            graph[name.removesuffix(".__init__")] = imports(path)
    sorter = graphlib.TopologicalSorter(
        {name: set(_modules(found & graph.keys())) for name, found in graph.items()}
    )
    sorter.prepare()  # raises CycleError, which names the circle


def _modules(found: set[str]) -> Iterator[str]:
    """Leave out packages of which a module is meant, as in ``from moescope import formats``."""
    for name in found:
        if not any(other.startswith(f"{name}.") for other in found):
            yield name


def test_only_the_service_lookup_names_the_service() -> None:
    users = {
        path.name
        for path in (ROOT / "client" / "moescope").rglob("*.py")
        if any(name.startswith("moescope_service") for name in imports(path))
    }
    assert not users


def test_private_names_of_the_client_stay_within_it() -> None:
    """Dunder names such as ``__version__`` are public."""
    files = [path for folder in OUTSIDE for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    for path in files:
        for name in imports(path):
            package, *parts = name.split(".")
            private = [one for one in parts if one.startswith("_") and not one.endswith("__")]
            assert package != "moescope" or not private, f"{path} imports {name}"


APART = {
    ROOT / "benchmarks": "tests",
    ROOT / "client" / "moescope": "benchmarks",
    SERVICE: "benchmarks",
}
"""Packages, and the one that they know nothing of."""


@pytest.mark.parametrize("package", APART, ids=lambda path: path.name)
def test_benchmarks_stand_between_what_is_installed_and_the_tests(package: Path) -> None:
    files = sorted(package.rglob("*.py"))
    assert files
    for path in files:
        tops = {name.partition(".")[0] for name in imports(path)}
        assert APART[package] not in tops, f"{path} imports {APART[package]}"
