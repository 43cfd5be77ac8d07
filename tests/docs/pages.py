"""The documentation as text: pages, sections, tables and links."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "examples" not in path.parts)
"""Every page of the site."""
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *PAGES]
"""Every text that the tests hold to the code."""
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)


def prose(path: Path) -> str:
    """Return a page without its blocks of code."""
    return _FENCE.sub("", path.read_text())


def slug(heading: str) -> str:
    """Return a heading's anchor, as GitHub and MkDocs make it of plain headings."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def anchors(path: Path) -> list[str]:
    """Return the anchors of a page."""
    return [slug(heading) for _, heading in _HEADING.findall(prose(path))]


def section(path: Path, anchor: str) -> str:
    """Return what stands under a heading, up to the next one of its level or above."""
    text = prose(path)
    headings = list(_HEADING.finditer(text))
    (start,) = [one for one in headings if slug(one[2]) == anchor]
    later = [
        one for one in headings if one.start() > start.start() and len(one[1]) <= len(start[1])
    ]
    return text[start.end() : later[0].start() if later else None]


def rows(text: str) -> list[list[str]]:
    """Return the cells of every row of the tables in a text, headers and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    found = []
    for line, after in zip(lines, [*lines[1:], ""], strict=False):
        if not re.match(r"\| ?-", line) and not re.match(r"\| ?-", after):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def code(text: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`\n]+)`", text)
