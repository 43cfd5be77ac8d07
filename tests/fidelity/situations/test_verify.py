"""`moescope verify` on a real server: it passes, and it fails where something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from moescope_service import bundled_model
from tests.fidelity.situations.served import Served


def verify(served: Served, model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moescope", "verify", "--url", served.server.url]
    command += ["--model", str(model), "--limit", "4", "--max-tokens", "12", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_server_that_is_right(default_server: Served) -> None:
    done = verify(default_server, bundled_model.path(), "--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "softmax top-4" in done.stdout
    assert "(100.00%)" in done.stdout
    assert "mismatches: 0" in done.stdout
    assert "everything matches" in done.stdout


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
    assert "no reference for models of type 'qwen2'" in done.stderr
    done = verify(default_server, model, "--against", "vllm")
    assert done.returncode == 1
    assert "--enable-return-routed-experts" in done.stderr
