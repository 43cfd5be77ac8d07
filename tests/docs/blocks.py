"""The fenced blocks of the documents: their language, their lines, the commands in them."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
"""Every page whose code is held to what there is."""
_FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<marks>`{3,}|~{3,})(?P<info>[^`]*)")
_COMMENT = re.compile(r"(?:^|\s)#\s.*$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    path: Path
    line: int
    """Number of its first line of code, from 1."""
    info: str
    """What stands behind the fence, such as ``python no-run``."""
    text: str

    @property
    def language(self) -> str:
        """The first word of the info string."""
        return self.info.split(maxsplit=1)[0].lower() if self.info else ""

    @property
    def runs(self) -> bool:
        """Whether the tests run it."""
        return "no-run" not in self.info.split()


@dataclasses.dataclass(frozen=True)
class Command:
    """What stands behind a ``$`` in a block of the language ``console``."""

    block: Block
    line: int
    text: str
    """The command, its continuation lines joined by newlines as a shell reads them."""

    @property
    def where(self) -> str:
        """File and line, as messages name them."""
        return f"{self.block.path.relative_to(ROOT)}:{self.line}"

    @property
    def one_line(self) -> str:
        """The command in one line, without the comment at its end."""
        joined = re.sub(r"\s*\\\n\s*", " ", self.text)
        return _COMMENT.sub("", joined).strip()


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a page.

    Raises:
        ValueError: A fence is never closed.
    """
    found: list[Block] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fence = _FENCE.fullmatch(line)
        if opened is None:
            if fence:
                opened, lines = fence, []
        elif fence and fence["marks"].startswith(opened["marks"]) and not fence["info"].strip():
            text = textwrap.dedent("\n".join(lines))
            found.append(Block(path, number - len(lines), opened["info"].strip(), text))
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        raise ValueError(f"{path}: the last block of code is never closed")
    return found


def python_of(path: Path) -> str:
    """Return the Python of a page that the tests run, each line at its number in the page."""
    script: list[str] = []
    for block in blocks(path):
        if block.language in {"python", "py"} and block.runs:
            script += [""] * (block.line - 1 - len(script)) + block.text.split("\n")
    return "\n".join(script) + "\n" if script else ""


def commands(path: Path) -> list[Command]:
    """Return the commands in the blocks of the language ``console``."""
    found = []
    for block in blocks(path):
        if block.language != "console":
            continue
        lines = block.text.split("\n")
        for number, line in enumerate(lines):
            if line.startswith("$ "):
                end = number
                while lines[end].endswith("\\"):
                    end += 1
                text = "\n".join(lines[number : end + 1]).removeprefix("$ ")
                found.append(Command(block, block.line + number, text))
    return found
