"""What cannot be served is refused at start: one clear line, and a non-zero exit."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moescope_service import bundled_model

OLD_VLLM = """
import sys
import vllm
vllm.__version__ = "0.19.0"
from moescope_service.serve import main
sys.exit(main(sys.argv[1:]))
"""


def dense_model(directory: Path) -> Path:
    """Make a model without experts; only its configuration is ever read."""
    for path in bundled_model.path().iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, directory)
    config = json.loads((directory / "config.json").read_text())
    config = {name: value for name, value in config.items() if "expert" not in name}
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Run every refused start side by side; return exit codes and error outputs."""
    serve = [sys.executable, "-m", "moescope", "serve"]
    dense = dense_model(tmp_path_factory.mktemp("dense"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        commands = {
            "dense": [*serve, str(dense), "--enforce-eager"],
            "port": [*serve, "--host", "127.0.0.1", "--port", port],
            "missing": [*serve, "/nowhere/model"],
            "version": [sys.executable, "-c", OLD_VLLM],
            "allowed": [
                *(sys.executable, "-c", OLD_VLLM),
                *("/nowhere/else", "--routes-allow-untested-vllm", "on"),
            ],
            "setting": [*serve, "--routes-memory", "much"],
            "log": [*serve, "--routes-log", "/nowhere/routes.jsonl"],
        }
        started = {
            name: subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
            )
            for name, command in commands.items()
        }
        results = {}
        for name, process in started.items():
            try:
                _, errors = process.communicate(timeout=240)
            finally:
                process.kill()
            results[name] = process.returncode, errors
    return results


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dense", "is a dense model: it has no experts to record"),
        ("port", "is in use: stop its server or choose another --port"),
        ("missing", "there is no model at /nowhere/model"),
        ("version", "vLLM 0.19.0 is installed, but moescope"),
        (
            "allowed",
            "there is no model at /nowhere/else",
        ),  # the version is not what it is refused for
        ("setting", "--routes-memory: 'much' is no size"),
        ("log", "--routes-log: cannot write /nowhere/routes.jsonl"),
    ],
)
def test_refused(name: str, says: str, refusals: dict[str, tuple[int, str]]) -> None:
    code, errors = refusals[name]
    assert code == 1, errors
    lines = [line for line in errors.splitlines() if line.startswith("moescope: ")]
    assert len(lines) == 1, errors
    assert says in lines[0]
    assert "Traceback" not in errors
