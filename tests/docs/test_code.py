"""The documents' code runs: every block of Python, and every ``$ curl`` of a console block.

A page's Python is one script in a process of its own, in which a traceback names the page's lines;
its ``curl`` commands come first. Blocks whose info string says ``no-run`` are left out. The
addresses of the documents become those of the server, and ids that a server made up
(``chatcmpl-…``, ``chatcmpl-b194bf42e374a6b2``) those of requests that it has answered; its archive
is at the documents' path.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from moescope import Client
from moescope.servers import Server
from tests.waiting import wait_until

from .blocks import PAGES, ROOT, commands, python_of

pytestmark = pytest.mark.e2e
TIMEOUT_S = 300
WITH_PYTHON = [path for path in PAGES if python_of(path)]
CURLS = [one for path in PAGES for one in commands(path) if one.text.startswith("curl ")]
WITH_CURL = sorted({one.block.path for one in CURLS})

_ADDRESS = re.compile(r"(?:http://)?(?:localhost|127\.0\.0\.1):8000\b")
_ARCHIVE = "/data/routes"
_MADE_UP_ID = re.compile(r"\b(?:chat)?cmpl-(?:…|[0-9a-f]{16,32}\b)")

RUN = """
import sys
path = sys.argv[1]
exec(compile(sys.stdin.read(), path, "exec"), {"__name__": "__main__", "__file__": path})
print("-- the end --", flush=True)
"""
CURLRC = "fail-with-body\nshow-error\nmax-time = 60\n"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def real(server: Server, archive: Path) -> Callable[[str], str]:
    """Return a function that puts the server's own in place of a document's.

    That is its address, ids of requests, and its archive, which then has a file.
    """

    def request_id(_: re.Match[str]) -> str:
        body = {"model": "moescope-demo", "prompt": "Tom has 3 apples.", "max_tokens": 8}
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        return str(response.raise_for_status().json()["id"])

    def replaced(text: str) -> str:
        if _ARCHIVE in text:
            _MADE_UP_ID.sub(request_id, "cmpl-…")
            wait_until(lambda: [*archive.rglob("part-*.parquet")], "a file of the archive")
        text = text.replace(_ARCHIVE, str(archive))
        return _ADDRESS.sub(server.url, _MADE_UP_ID.sub(request_id, text))

    return replaced


@pytest.fixture(autouse=True)
def captures_again(server: Server) -> None:
    """A page may show how to pause."""
    with Client(server.url) as client:
        client.resume()


def run(
    command: list[str], directory: Path, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a directory."""
    (directory / ".curlrc").write_text(CURLRC)
    env = {**os.environ, "CURL_HOME": str(directory), "VLLM_CPU_KVCACHE_SPACE": "1"}
    return subprocess.run(
        command, cwd=directory, env=env, input=text, check=False, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip


@pytest.mark.parametrize("path", WITH_CURL, ids=name)
def test_the_curl_commands_of_a_page_run(
    path: Path, tmp_path: Path, real: Callable[[str], str]
) -> None:
    for one in CURLS:
        if one.block.path == path and one.block.runs:
            done = run(["bash", "-o", "pipefail", "-c", real(one.text)], tmp_path)
            assert done.returncode == 0, f"{one.where}: {one.text}\n{done.stdout}"


@pytest.mark.parametrize("path", WITH_PYTHON, ids=name)
def test_the_python_of_a_page_runs(path: Path, tmp_path: Path, real: Callable[[str], str]) -> None:
    told = run([sys.executable, "-c", RUN, str(path)], tmp_path, real(python_of(path))).stdout
    # Not by its status: pyarrow's threads may abort a process that is ending (Arrow issue 34314).
    if "-- the end --" not in told.splitlines():
        lines = re.findall(rf'File "{re.escape(str(path))}", line (\d+)', told)
        where = f"{name(path)}:{lines[-1]}" if lines else name(path)
        pytest.fail(f"{where}: the Python of this page does not run\n{told}", pytrace=False)


def test_there_is_code_to_run() -> None:
    assert ROOT / "README.md" in WITH_PYTHON
    assert ROOT / "README.md" in WITH_CURL
