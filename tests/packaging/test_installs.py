"""Installing the wheel: alone and with each extra."""

from __future__ import annotations

import email
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packages import REQUIREMENTS, pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ADDED = {
    "": set(),
    "arrow": {"pyarrow"},
    "hub": {"huggingface_hub", "pyarrow"},
}
"""What may be imported, by extra; nothing else of `OPTIONAL` may."""
OPTIONAL = {"huggingface_hub", "pyarrow", "torch", "vllm", "fastapi", "zmq", "pytest"}

# The client's records become a table and come back.
ROUND_TRIP = """
import numpy as np
from moescope import RouteTrace, arrow

trace = RouteTrace(
    request_id="chatcmpl-1", index=0, model="m", num_experts=8, num_hidden_layers=2,
    layers=np.array([0, 1], np.int32), topk_ids=np.ones((3, 2, 2), np.uint8), topk_weights=None,
    source=np.zeros(3, np.uint8), token_ids=None, prompt_len=2, num_tokens=4, cached_len=0,
    finish_reason="stop", complete=True, created_s=0.0,
)
(same,) = arrow.from_table(arrow.to_table([trace]))
assert (same.topk_ids == trace.topk_ids).all()
"""


def pip(*args: str) -> str:
    """Run this environment's pip, which installs into others too."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=clean_env(), timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def clean_env(**more: str) -> dict[str, str]:
    """Return an environment in which the source tree is not found."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more


class Installed:
    """A fresh virtual environment with the wheel, in the pinned versions."""

    def __init__(self, directory: Path, wheel: Path, extra: str) -> None:
        self.directory = directory
        venv = directory / "venv"
        command = [sys.executable, "-m", "venv", "--without-pip", str(venv)]
        subprocess.run(command, check=True, timeout=60)
        self.bin = venv / "bin"
        constraints = [f"--constraint={REQUIREMENTS / name}.txt" for name in ("cpu", "arrow")]
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        pip(f"--python={self.bin / 'python'}", "install", "--quiet", *constraints, wanted)

    def run(self, program: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / program), *args],
            cwd=self.directory, env=clean_env(**env), check=False, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip

    def python(self, code: str) -> str:
        done = self.run("python", "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module", params=ADDED, ids=lambda extra: extra or "alone")
def extra(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def installed(extra: str, wheel_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel_path, extra)


def test_it_brings_what_it_says(extra: str, installed: Installed) -> None:
    code = f"import importlib.util as u; print(*(n for n in {OPTIONAL!r} if u.find_spec(n)))"
    assert set(installed.python(code).split()) == ADDED[extra]


def test_it_runs(installed: Installed) -> None:
    version = installed.python("import moescope; print(moescope.__version__)").strip()
    assert installed.run("moescope", "--version").stdout == f"moescope {version}\n"
    told = installed.run("moescope", "--help")
    assert told.returncode == 0
    assert {"serve", "replay", "bench", "verify"} <= set(told.stdout.split())
    written = installed.run("moescope", "prompts", "sample", "--out", "prompts.txt")
    assert written.returncode == 0, written.stderr
    prompts = (installed.directory / "prompts.txt").read_text().splitlines()
    assert f"{len(prompts)} prompts: prompts.txt" in written.stdout


def test_arrow_is_there_with_its_extra(extra: str, installed: Installed) -> None:
    if "pyarrow" in ADDED[extra]:
        installed.python(ROUND_TRIP)
    else:
        done = installed.run("python", "-c", "import moescope.arrow")
        assert "moescope's extra `arrow`: pip install pyarrow" in done.stderr


def test_the_hub_is_there_with_its_extra(extra: str, installed: Installed) -> None:
    done = installed.run(
        "moescope", "prompts", "gsm8k", "--out", "gsm8k.txt",
        HF_HUB_OFFLINE="1", HF_HOME=str(installed.directory / "home"),
    )  # fmt: skip
    assert done.returncode == 1
    told = "cannot fetch openai/gsm8k" if extra == "hub" else "needs huggingface_hub"
    assert told in done.stderr


def test_serving_without_the_service_says_what_to_install(installed: Installed) -> None:
    done = installed.run("moescope", "serve")
    assert done.returncode == 1
    assert done.stderr.startswith("moescope: vllm is not installed: ")


def would_install(wanted: str, *options: str) -> list[str]:
    """Return the names of what pip would install, by its dry run."""
    told = pip("install", "--dry-run", "--quiet", "--report=-", *options, wanted)
    assert "does not provide the extra" not in told
    report = json.loads(told[told.index("{") : told.rindex("}") + 1])
    return [canonicalize_name(item["metadata"]["name"]) for item in report["install"]]


def test_the_cpu_list_is_all_that_the_service_needs(wheel_path: Path) -> None:
    """This environment has that list, and pip finds nothing to add to it."""
    assert would_install(f"{wheel_path}[service]") == ["moescope"]


def test_the_cuda_list_has_what_the_extra_wants(wheel_path: Path) -> None:
    """Resolving it anew would download vLLM's 1.4 GB, so its list is compared with the metadata."""
    assert would_install(f"{wheel_path}[cuda]", "--no-deps") == ["moescope"]
    with zipfile.ZipFile(wheel_path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert set(metadata.get_all("Provides-Extra", ())) == {"arrow", "cuda", "hub", "service"}
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist", ())]
    mine = [
        one
        for one in wanted
        if one.name != "moescope"
        and (
            one.marker is None
            or any(one.marker.evaluate({"extra": e}) for e in ("cuda", "service"))
        )
    ]
    assert {"fastapi", "httpx", "torch", "vllm"} <= {one.name for one in mine}
    pinned = {canonicalize_name(name): found for name, found in pins("cuda").items()}
    for one in mine:
        versions = pinned.get(canonicalize_name(one.name), set())
        assert versions, one
        assert all(one.specifier.contains(version) for version in versions), (one, versions)
