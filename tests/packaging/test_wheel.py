"""What the wheel installs, and what the pinned lists hold."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = directory.glob("*.whl")
    return zipfile.ZipFile(path)


def test_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "moescope",
        "moescope_service",
    }


def test_data_is_inside(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    checkpoint = "moescope_service/bundled_model/checkpoint"
    assert {
        "moescope/py.typed",
        "moescope_service/py.typed",
        "moescope/data/sample.jsonl",
        f"{checkpoint}/config.json",
        f"{checkpoint}/model.safetensors",
        f"{checkpoint}/tokenizer.json",
    } <= names
    assert wheel.getinfo(f"{checkpoint}/model.safetensors").file_size <= 8_000_000


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    (path,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(path).decode())
    assert parser["console_scripts"]["moescope"] == "moescope.cli:main"
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        assert list(parser[group]) == ["moescope"]


def test_the_light_base_wants_neither_torch_nor_vllm() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert base == {"httpx", "matplotlib", "numpy", "orjson", "rich", "typer"}
    pinned = (ROOT / "requirements" / "light.txt").read_text()
    assert not re.search(r"^(torch|vllm|transformers)\b", pinned, re.MULTILINE)


@pytest.mark.parametrize("name", ["cpu", "cuda", "dev", "light"])
def test_pinned_lists_hold_versions_and_no_addresses(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert lines
    assert all(re.match(r"[\w.\-]+(\[[\w,\-]+\])?==\S+", line) for line in lines)
    assert "://" not in text
