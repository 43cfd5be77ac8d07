"""What is measured, one after the other: a plan's entries and how they are run."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import result, summarize
from moescope.errors import CommandError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something that is measured by itself."""

    name: str
    about: str
    """What it measures."""
    commands: Sequence[Sequence[str]]
    """Modules and their arguments, each after ``python -m``."""
    raw: Path
    """The result file that they write."""
    summary: Path
    """Where to put what may be committed of it."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables, where this process has none of that name."""


def pick(entries: Sequence[Entry], only: Sequence[str] | None) -> list[Entry]:
    """Return the entries of these names, or all.

    Raises:
        CommandError: There is no entry of a name.
    """
    names = [one.name for one in entries]
    for name in only or ():
        if name not in names:
            raise CommandError(f"invalid --only {name!r}: expected one of {', '.join(names)}")
    return [one for one in entries if not only or one.name in only]


def run(entry: Entry) -> None:
    """Run an entry's commands; write the summary of its result beside it.

    Raises:
        CommandError: A command fails.
    """
    print(f"{entry.name}: {entry.about}", flush=True)
    commit = result.commit()
    entry.raw.parent.mkdir(parents=True, exist_ok=True)
    env = {**entry.environment, **os.environ}
    for command in entry.commands:
        done = subprocess.run([sys.executable, "-m", *command], env=env, check=False)
        if done.returncode:
            raise CommandError(
                f"{entry.name} failed with exit status {done.returncode}: {to_text(command)}"
            )
    summarize.write(entry.raw, entry.summary, commit)


def to_text(command: Sequence[str]) -> str:
    """Return a command as it is typed."""
    return shlex.join(["python", "-m", *command])


def show(entry: Entry) -> None:
    """Print what would be run."""
    print(f"{entry.name}: {entry.about}")
    for command in entry.commands:
        print(f"  {to_text(command)}")
