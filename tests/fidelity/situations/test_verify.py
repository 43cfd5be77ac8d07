"""`moescope verify` on a real server: it passes, and it fails where something is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.fidelity.planted import FAULTS, planted
from moescope_service import bundled_model
from tests.fidelity.situations.served import BLOCK, Served, serve


def verify(served: Served, model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return verify_at(served.server.url, model, *flags)


def verify_at(url: str, model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "moescope", "verify", "--url", url]
    command += ["--model", str(model), "--limit", "4", "--max-tokens", "12", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_server_that_is_right(default_server: Served) -> None:
    done = verify(default_server, bundled_model.path(), "--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "softmax top-4" in done.stdout
    assert "(100.00%)" in done.stdout
    assert "mismatches: 0" in done.stdout
    assert done.stdout.endswith("\neverything matches\n")
    cached = re.search(r", (\d+) of them from the prefix cache\n", done.stdout)
    assert cached is not None
    assert int(cached[1]) >= 2 * BLOCK


@pytest.fixture(scope="module")
def bfloat16_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The bundled model as `moescope serve` serves it, in bfloat16; without a prefix cache."""
    log = tmp_path_factory.mktemp("bfloat16") / "bfloat16.log"
    flags = ("--dtype", "bfloat16", "--no-enable-prefix-caching")
    with serve(log, *flags) as served:
        yield served


def test_a_server_that_is_right_in_bfloat16(bfloat16_server: Served) -> None:
    done = verify(bfloat16_server, bundled_model.path())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the server computes in bfloat16" in done.stdout
    assert "mismatches: 0" in done.stdout
    assert "the server has prefix caching off" in done.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told(bfloat16_server: Served, fault: str) -> None:
    with planted(bfloat16_server.server.url, fault) as url:
        done = verify_at(url, bundled_model.path())
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = re.findall(r"  wrong: cmpl-\S+, position \d+, layer \d: .* wanted, .*\n", done.stdout)
    assert 1 <= len(wrong) <= 10, done.stdout
    assert ("weights" in wrong[0]) == (fault == "swapped_weights")
    assert ("more\n" in done.stdout) == (fault == "shifted_rows")
    assert "NOT everything matches" in done.stdout


def copy_of_the_model(directory: Path) -> Path:
    shutil.copytree(bundled_model.path(), directory)
    return directory


def test_another_checkpoint(default_server: Served, tmp_path: Path) -> None:
    """Two experts of one layer change places: a wrong row would look like this."""
    model = copy_of_the_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    gate = weights["model.layers.3.mlp.gate.weight"]
    gate[[5, 6]] = gate[[6, 5]]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    done = verify(default_server, model, "--dtype", "bfloat16")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT everything matches" in done.stdout
    assert "mismatches: 0" not in done.stdout


def test_a_pause_is_told_by_its_cause(default_server: Served) -> None:
    default_server.client.pause()
    try:
        done = verify(default_server, bundled_model.path(), "--dtype", "float32")
    finally:
        default_server.client.resume()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "by cause: paused" in done.stdout


def test_what_there_is_no_reference_for(default_server: Served, tmp_path: Path) -> None:
    model = copy_of_the_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    done = verify(default_server, model)
    assert done.returncode == 1
    assert "unknown model type 'qwen2': expected one of" in done.stderr
    done = verify(default_server, model, "--against", "vllm")
    assert done.returncode == 1
    assert "--enable-return-routed-experts" in done.stderr
