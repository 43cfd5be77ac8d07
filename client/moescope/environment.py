"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def hardware() -> dict[str, str | int | float]:
    """Return the CPU's model, its cores as this process may use them, and the RAM in GiB."""
    ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(ram_bytes / 2**30, 1),
    }


def cpu_model(cpuinfo: Path) -> str:
    """Return the CPU's model name; its architecture where the system names no model."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()


def system() -> dict[str, str]:
    """Return the versions of Python and the operating system."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
