"""`moescope diff` on real runs: it names the layer whose router is another one, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from moescope.cli import main
from moescope_service import bundled_model
from tests.fidelity.conftest import run_jobs

LAYER = 3
NOISE = 0.1
"""Of the router's weights, as a part of their standard deviation."""


def with_another_router(directory: Path) -> Path:
    """Copy the bundled model, with noise in the router of `LAYER`."""
    shutil.copytree(bundled_model.path(), directory)
    (file,) = directory.glob("*.safetensors")
    weights = load_file(file)
    gate = weights[f"model.layers.{LAYER}.mlp.gate.weight"].float()
    noise = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0))
    changed = (gate + NOISE * gate.std() * noise).to(torch.bfloat16)
    weights[f"model.layers.{LAYER}.mlp.gate.weight"] = changed
    save_file(weights, file, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces of the same prompts: in float32 twice, in bfloat16, and with another router."""
    directory = tmp_path_factory.mktemp("runs")
    own = str(bundled_model.path())
    other = str(with_another_router(directory / "model"))
    jobs = [
        {"model": model, "out": str(directory / f"{name}.npz"), "options": options}
        for name, model, options in (
            ("first", own, {}),
            ("again", own, {}),
            ("bfloat16", own, {"dtype": "bfloat16"}),
            ("router", other, {}),
        )
    ]
    for job in jobs:
        job["options"] = {"enforce_eager": True, **job["options"]}
    run_jobs(jobs, directory)
    assert not list(directory.glob("*.error")), (directory / "log").read_text()[-4000:]
    return directory


def diff(runs: Path, other: str, *flags: str) -> tuple[int, dict[str, Any]]:
    """Compare a run with the first one: (exit status, ``diff.json``)."""
    paths = [str(runs / f"{name}.npz") for name in ("first", other, "again")]
    out = runs / f"diff-{other}"
    try:
        status = main(["diff", *paths[:2], "--again", paths[2], "-o", str(out), "--force", *flags])
    except SystemExit as error:
        status = int(error.code or 0)
    return status, orjson.loads((out / "diff.json").read_bytes())


def test_the_layer_of_another_router_is_named(runs: Path) -> None:
    status, found = diff(runs, "router", "--fail-above", "rows=0.02")
    assert status == 1, "the bound is exceeded"
    first = found["first_changed_layer"]
    assert (first["rows"], first["weights"]) == (LAYER, LAYER)
    rows = found["by_layer"]["rows"]
    assert rows["changed"] == [layer >= LAYER for layer in found["layers"]]
    assert max(rows["noise"]) < min(rows["values"][LAYER:])
    assert found["by_layer"]["first"]["values"][LAYER] > 0.05
    assert found["compared"]["texts_diverged"] > 0
    assert found["compared"]["rows_after_divergence"] > 0


def test_bfloat16_changes_weights_everywhere_and_most_experts_by_near_ties(runs: Path) -> None:
    status, found = diff(runs, "bfloat16", "--fail-above", "rows=0.02")
    assert status == 0, found["totals"]
    assert all(found["by_layer"]["weights"]["changed"])
    assert found["by_layer"]["near_ties"]["values"][0] > found["by_layer"]["rows"]["values"][0]
    assert found["totals"]["near-ties"] > found["totals"]["rows"]


def test_the_same_server_again_changed_nothing(runs: Path) -> None:
    shutil.copy(runs / "again.npz", runs / "third.npz")
    status, found = diff(runs, "third", "--fail-above", "changed=0", "--fail-above", "texts=0")
    assert status == 0, found["totals"]
    assert set(found["first_changed_layer"].values()) == {None}
