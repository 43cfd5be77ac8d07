"""A small file system, to be filled."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[None]:
    """Mount a file system of 128 KiB."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "moescope-test", str(path)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted: {mounted.stderr.strip()}")
    yield
    subprocess.run(["umount", str(path)], check=True, timeout=30)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))
    return filler
