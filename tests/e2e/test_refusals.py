"""What cannot be served is refused at start: one clear line, and a non-zero exit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

import pytest

from moescope.servers import captured_command, free_ports, stock_command
from moescope_service import bundled_model

OLD_VLLM = """
import sys
import vllm
vllm.__version__ = "0.19.0"
from moescope_service.serve import main
sys.exit(main(sys.argv[1:]))
"""


TIMEOUT_S = 480.0
"""For all of them together: each imports vLLM."""


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


def without_isal(directory: Path) -> dict[str, str]:
    """Return an environment in which isal cannot be imported."""
    (directory / "isal.py").write_text("raise ModuleNotFoundError(\"No module named 'isal'\")")
    path = filter(None, [str(directory), os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Run every refused start side by side; return exit codes and error outputs."""
    serve = captured_command([])
    dense = dense_model(tmp_path_factory.mktemp("dense"))
    lacking = without_isal(tmp_path_factory.mktemp("lacking"))
    plugin = {"MOESCOPE_ENABLE": "1", "VLLM_PLUGINS": "moescope"}
    ports = map(str, free_ports(3))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        commands = {
            "dense": [*serve, str(dense), "--enforce-eager", "--port", next(ports)],
            "port": [*serve, "--host", "127.0.0.1", "--port", port],
            "missing": [*serve, "/nowhere/model"],
            "version": [sys.executable, "-P", "-c", OLD_VLLM],
            "allowed": [
                *(sys.executable, "-P", "-c", OLD_VLLM),
                *("/nowhere/else", "--routes-allow-untested-vllm", "on"),
            ],
            "setting": [*serve, "--routes-memory", "much"],
            "log": [*serve, "--routes-log", "/nowhere/routes.jsonl"],
            "lacking": [*serve, "--port", next(ports)],
            "plugin": stock_command(["--model", str(bundled_model.path()), "--port", next(ports)]),
            "vllm": [str(Path(sys.executable).with_name("vllm")), "serve", "/nowhere/model"],
        }
        return run(commands, {"lacking": lacking, "plugin": {**lacking, **plugin}})


def end_group(pid: int) -> None:
    """End what is left of a process that should have refused to start, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def run(
    commands: Mapping[str, Sequence[str]], variables: Mapping[str, dict[str, str]]
) -> dict[str, tuple[int, str]]:
    """Run commands side by side, each with its variables; return exit codes and error outputs."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name, command in commands.items():
            env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **variables.get(name, {})}
            process = subprocess.Popen(
                command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
            started[name] = stack.enter_context(process)
            stack.callback(end_group, process.pid)  # before its end is waited for
        deadline_s = time.monotonic() + TIMEOUT_S
        told = {}
        for name, process in started.items():
            _, errors = process.communicate(timeout=max(1.0, deadline_s - time.monotonic()))
            told[name] = process.returncode, errors
        return told


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
        ("setting", "invalid --routes-memory 'much': expected bytes"),
        ("log", "--routes-log: cannot write /nowhere/routes.jsonl"),
        ("lacking", "No module named 'isal'; in a clone of moescope, pip install"),
    ],
)
def test_refused(name: str, says: str, refusals: dict[str, tuple[int, str]]) -> None:
    code, errors = refusals[name]
    assert code == 1, errors
    lines = [line for line in errors.splitlines() if line.startswith("moescope: ")]
    assert len(lines) == 1, errors
    assert says in lines[0]
    assert "Traceback" not in errors


def test_a_server_of_vllm_does_not_start_without_endpoints(
    refusals: dict[str, tuple[int, str]],
) -> None:
    code, errors = refusals["plugin"]
    assert code == 1, errors
    (line,) = [one for one in errors.splitlines() if one.startswith("moescope_service.errors.")]
    assert "cannot import moescope_service.api" in line
    assert "No module named 'isal'; in a clone of moescope, pip install" in line


def test_vllms_own_command_does_not_start_with_its_cpu_build(
    refusals: dict[str, tuple[int, str]],
) -> None:
    """What docs/serving.md says of it, and of what to run in its place."""
    if any(distributions(name="vllm")):
        pytest.skip("this vLLM is a distribution called vllm")
    code, errors = refusals["vllm"]
    assert code == 1, errors
    assert "No package metadata was found for vllm" in errors
