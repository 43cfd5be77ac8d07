"""A server starts with all that it needs, or not at all."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moescope_service
from moescope_service.errors import RefusedError
from moescope_service.imports import check_imports
from moescope_service.plugin import check_endpoints

SERVICE = Path(moescope_service.__file__).parent
CHECK = """
import json
import multiprocessing
import sys
from moescope_service.imports import check_imports

def check(case):
    package, *options = case
    for name in list(sys.modules):
        if name.startswith((package + ".", "moescope_service")):
            del sys.modules[name]
    sys.modules[package] = None
    from moescope_service.errors import RefusedError
    from moescope_service.imports import check_imports
    try:
        check_imports(with_endpoints="server" in options, with_cuda="cuda" in options)
    except RefusedError as error:
        return str(error)
    return ""

check_imports(with_endpoints=True, with_cuda=True)  # once; each case forks from here
cases = json.loads(sys.argv[1])
with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
    print(json.dumps(pool.map(check, cases, chunksize=1)))
"""
NEEDED_ELSEWHERE = ("archive", "bundled_model", "verify")


def needed() -> dict[str, set[Path]]:
    """What the service imports at the top of its modules: by package, where."""
    found: dict[str, set[Path]] = {}
    for path in sorted(SERVICE.rglob("*.py")):
        inside = path.relative_to(SERVICE)
        if inside.parts[0] in NEEDED_ELSEWHERE:
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(inside)
    own = {"moescope", "moescope_service", *sys.stdlib_module_names}
    return {name: places for name, places in found.items() if name not in own}


NEEDED = needed()


@pytest.fixture(scope="module")
def refusals() -> dict[tuple[str, ...], str]:
    """What is told with each package missing in turn, to a server and to a script."""
    cases = [
        (package, *options)
        for package in [*NEEDED, "nothing"]
        for options in (("server", "cuda"), ("server",), ())
    ]
    command = [sys.executable, "-P", "-W", "ignore", "-c", CHECK, json.dumps(cases)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return dict(zip(cases, json.loads(done.stdout), strict=True))


def test_the_service_needs_what_its_extra_names():
    assert NEEDED.keys() == {
        *("fastapi", "isal", "msgspec", "numpy", "orjson", "packaging"),
        *(
            "prometheus_client",
            "pydantic",
            "sortedcontainers",
            "starlette",
            "torch",
            "triton",
            "zmq",
        ),
    }


@pytest.mark.parametrize("package", NEEDED)
def test_a_server_is_refused_without_what_it_needs(package, refusals):
    message = refusals[package, "server", "cuda"]
    assert message.startswith("cannot import moescope_service."), message
    assert package in message
    assert "pip install '.[cuda]'" in message
    assert "make setup" in message


def test_what_is_not_needed_is_not_asked_for(refusals):
    """Scripts need no endpoints, and machines without an NVIDIA GPU no Triton."""
    told = {case for case, message in refusals.items() if message}
    for package, places in NEEDED.items():
        is_cuda = all(path.parts[:2] == ("capture", "cuda") for path in places)
        is_api = all(path.parts[0] == "api" for path in places)
        assert ((package, "server") in told) == (not is_cuda), package
        assert ((package,) in told) == (not is_cuda and not is_api), package
    assert not {case for case in told if case[0] == "nothing"}


def test_endpoints_that_vllm_would_not_find_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **which: ())
    check_imports(with_endpoints=False)
    with pytest.raises(RefusedError, match="entry points are not installed"):
        check_imports(with_endpoints=True)


def test_the_plugin_checks_the_endpoints_of_a_server_alone(monkeypatch):
    from vllm.usage.usage_lib import UsageContext

    monkeypatch.setenv("VLLM_PLUGINS", "moescope")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **which: ())
    check_endpoints(UsageContext.LLM_CLASS)
    with pytest.raises(RefusedError, match="entry points are not installed"):
        check_endpoints(UsageContext.OPENAI_API_SERVER)


def test_the_plugin_itself_needs_python_alone():
    """vLLM logs a plugin that it cannot import, and goes on without it."""
    path = os.pathsep.join(str(root) for root in (SERVICE.parent, *client_roots()))
    subprocess.run(
        [sys.executable, "-P", "-S", "-c", "import moescope_service.plugin"],
        check=True, timeout=60, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def client_roots() -> list[Path]:
    import moescope

    return [Path(moescope.__file__).parents[1]]
