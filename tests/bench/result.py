"""What every result file begins with."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import orjson

from moescope import environment
from moescope_service.versions import versions

_OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with ``--out``."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--out", type=Path, required=True, help="The result file.")
    return made


def write(out: Path, module: str, **values: Any) -> None:
    """Write a result with when, how and on what it was measured."""
    arguments = [one.removeprefix(f"{out.parent}/") for one in sys.argv[1:]]
    result = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *arguments]),
        "hardware": environment.hardware(),
        "load_average": os.getloadavg(),
        "versions": {**versions(), **environment.system()},
        **values,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(orjson.dumps(result, option=_OPTIONS))
