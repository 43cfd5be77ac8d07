"""Makes a module of these measurements a plugin that vLLM finds, in all its processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def install(directory: Path, name: str, register: str) -> None:
    """Write the metadata by which vLLM finds a plugin; see `python_path`.

    Args:
        directory: Where to.
        name: The plugin's.
        register: ``module:function``, which vLLM calls in every process.
    """
    info = directory / f"{name}-0.dist-info"
    info.mkdir(parents=True)
    project = name.replace("_", "-")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {register}\n")


def python_path(directory: Path) -> dict[str, str]:
    """Return the variable of a server that finds the plugin of a directory, and this code."""
    path = os.pathsep.join([str(directory), str(Path.cwd()), *filter(None, sys.path)])
    return {"PYTHONPATH": path}
