"""Checkpoints of all schemes, and their traces from one process with ``vllm.LLM``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():  # torch's and transformers' own, at their import
    warnings.simplefilter("ignore")
    from tests.fidelity import checkpoints
from benchmarks.fidelity import cells
from tests.fidelity.schemes import HYBRID, SCHEMES, UNSERVED, Scheme

TIMEOUT_S = 1500
ALL = (*SCHEMES, UNSERVED, HYBRID)
IS_WHOLE = cells.VARIABLE in os.environ
"""Whether a table is made of what is compared; else a part of what takes long is left out."""
HALVED = [
    *((scheme, "bfloat16") for scheme in (*SCHEMES, HYBRID)),
    *((scheme, "float16") for scheme in SCHEMES[:: 1 if IS_WHOLE else 4]),
]


def place(directory: Path, scheme: Scheme) -> Path:
    return directory / str(ALL.index(scheme))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoint of every scheme; see `place`."""
    directory = tmp_path_factory.mktemp("models")
    for scheme in ALL:
        checkpoints.make(scheme, place(directory, scheme))
    return directory


@pytest.fixture(scope="session")
def traced(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the traces of every scheme's model, or the error; and a compiled run."""
    out = tmp_path_factory.mktemp("traces")
    jobs = [
        {
            "model": str(place(models, scheme)),
            "out": f"{place(out, scheme)}.npz",
            "options": {"enforce_eager": True, **scheme.llm_options},
        }
        for scheme in (*SCHEMES, UNSERVED)
    ]
    compiled = {"out": str(out / "compiled.npz"), "options": {}}
    jobs.append({"model": jobs[0]["model"], **compiled})
    run_jobs(jobs, out)
    return out


@pytest.fixture(scope="session")
def halved(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the traces of every scheme's model in half precision; see `halved_place`."""
    out = tmp_path_factory.mktemp("halved")
    jobs = [
        {
            "model": str(place(models, scheme)),
            "out": str(halved_place(out, scheme, dtype)),
            "options": {"enforce_eager": True, **scheme.llm_options, "dtype": dtype},
        }
        for scheme, dtype in HALVED
    ]
    run_jobs(jobs, out)
    return out


def halved_place(directory: Path, scheme: Scheme, dtype: str) -> Path:
    return directory / f"{ALL.index(scheme)}-{dtype}.npz"


def run_jobs(jobs: list[dict[str, Any]], out: Path, env: Mapping[str, str] | None = None) -> None:
    """Run jobs of `tests.fidelity.run_offline` in a process of their own.

    Args:
        jobs: The jobs.
        out: Where its log goes.
        env: Further variables.
    """
    (out / "jobs.json").write_text(json.dumps(jobs))
    variables = {
        **os.environ,
        "MOESCOPE_ENABLE": "1",
        "MOESCOPE_ROUTES_WEIGHTS_DTYPE": "float32",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        **(env or {}),
    }
    with (out / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fidelity.run_offline", str(out / "jobs.json")],
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, (out / "log").read_text()[-4000:]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of the test's own, the same in every run."""
    return np.random.default_rng(list(request.node.name.encode()))
