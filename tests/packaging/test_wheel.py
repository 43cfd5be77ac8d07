"""What the wheel installs."""

from __future__ import annotations

import configparser
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(wheel_path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_path)


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
        "moescope_service/page/index.html",
        "moescope_service/page/style.css",
        "moescope_service/page/app.js",
    } <= names
    assert wheel.getinfo(f"{checkpoint}/model.safetensors").file_size <= 8_000_000


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    (path,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(path).decode())
    assert parser["console_scripts"]["moescope"] == "moescope.cli:main"
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        assert list(parser[group]) == ["moescope"]
