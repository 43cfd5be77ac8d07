"""Reads the Dockerfiles and docker/compose.yaml, as far as their tests need it."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu")
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


class Instruction(NamedTuple):
    name: str
    value: str

    def array(self) -> list[str]:
        """Return the value of an instruction in its JSON form."""
        found = re.search(r"\[.*\]", self.value)
        assert found, f"{self.name} is not in its JSON form: {self.value}"
        return json.loads(found[0])


def stages(path: Path) -> list[list[Instruction]]:
    """Return the instructions of each stage, lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    found: list[list[Instruction]] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            instruction = Instruction(*line.split(maxsplit=1))
            if instruction.name == "FROM":
                found.append([])
            found[-1].append(instruction)
    return found


def final(path: Path, name: str) -> list[Instruction]:
    """Return the instructions of that name in the stage that becomes the image."""
    return [instruction for instruction in stages(path)[-1] if instruction.name == name]


def in_context(path: PurePosixPath) -> bool:
    """Return whether .dockerignore lets a path into the build context: its last match decides."""
    inside = True
    parts = [str(parent) for parent in [*reversed(path.parents), path]][1:]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and any(_matches(part, pattern) for part in parts):
            inside = line.startswith("!")
    return inside


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch(PurePosixPath(path).name, pattern.removeprefix("**/"))
    return path.count("/") == pattern.count("/") and fnmatch(path, pattern)


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Return the source of each mount by the path that it has in the container."""
    pairs = [volume.split(":") for volume in service.get("volumes", [])]
    return {target: source for source, target, *_ in pairs}
