"""What every result file begins with."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson

from moescope import environment
from moescope_service.vllm_contract.versions import versions

ROOT = Path(__file__).parents[1]
_OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with ``--out``."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--out", type=Path, required=True, help="The result file.")
    return made


def commit() -> str | None:
    """Return the commit that is measured, ``-dirty`` where files differ; None outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()


def gpu() -> str | None:
    """Return the GPU's name, memory and driver; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def write(out: Path, module: str, **values: Any) -> None:
    """Write a result with when, how and on what it was measured."""
    arguments = [one.removeprefix(f"{out.parent}/") for one in sys.argv[1:]]
    result = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["python", "-m", module, *arguments]),
        "hardware": environment.hardware(),
        "load_average": os.getloadavg(),
        "versions": {**versions(), **environment.system()},
        **values,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(orjson.dumps(result, option=_OPTIONS))
