"""A real vLLM server for the page, and the load that it is under."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.simulation.server import API_KEY, MODEL, serving
from moescope.servers import Server, captured_command
from moescope_service import bundled_model
from tests.waiting import DEADLINE_S, wait_until

HEADERS = {"Authorization": f"Bearer {API_KEY}"}


@contextlib.contextmanager
def vllm_server(directory: Path) -> Iterator[Server]:
    """Serve the bundled model on the CPU."""
    command = captured_command([str(bundled_model.path()), "--enforce-eager"])
    with serving(command, {}, directory / "page.log") as server:
        yield server


def moescope(*args: str) -> list[str]:
    return [sys.executable, "-P", "-m", "moescope", *args]


@contextlib.contextmanager
def replayed(server: Server, directory: Path, limit: int) -> Iterator[subprocess.Popen[bytes]]:
    """Let `moescope replay` send word problems of the sample meanwhile."""
    prompts = str(directory / "prompts.txt")
    made = moescope("prompts", "sample", "--limit", str(limit), "--out", prompts)
    subprocess.run(made, check=True, capture_output=True, timeout=DEADLINE_S)
    command = moescope("replay", "--run-dir", str(directory / "run"), "--prompts", prompts)
    command += ["--base-url", server.url, "--api-key", API_KEY, "--concurrency", "4"]
    with (directory / "replay.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def complete(server: Server, prompt: str, **body: Any) -> tuple[str, Any]:
    """Send a prompt; return the response's id, and its trace with the text of the tokens."""
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0, **body}
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=DEADLINE_S) as http:
        answer = http.post("/v1/completions", json=asked)
        answer.raise_for_status()
        request_id = answer.json()["id"]

        def ended() -> Any:
            found = http.get(f"/routes/{request_id}", params={"tokens": True})
            return found.json()["traces"] if found.status_code == 200 else None

        (trace,) = wait_until(ended, "it ends")
    return request_id, trace
