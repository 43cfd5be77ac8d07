"""Builds the packages, and reads the pinned lists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"


def build(source: Path, directory: Path, *targets: str) -> None:
    """Build the targets, ``wheel`` or ``sdist``, of a source tree into a directory."""
    options = [word for target in targets for word in ("-t", target)]
    command = [sys.executable, "-m", "hatchling", "build", *options, "-d", str(directory)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)


def pins(name: str) -> dict[str, set[str]]:
    """Return the versions of each package of a list; some depend on the version of Python."""
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    found: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([\w.\-]+)==([^\s;]+)", text, re.MULTILINE):
        found.setdefault(package, set()).add(version)
    return found
