"""report.html: an analysis on one page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from moescope._style import GRID, INK, SOFT
from moescope._version import __version__
from moescope.analyze.section import Section
from moescope.received import escaped

_MAX_LINES = 40
_CSS = f"""
body {{ color: {INK}; font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px;
  padding: 1em 1.5em 4em; background: white }}
h1 {{ font-size: 1.7em; margin-bottom: 0.2em }}
h2 {{ font-size: 1.25em; margin: 2.2em 0 0.3em; border-top: 1px solid {GRID}; padding-top: 1em }}
p {{ max-width: 48em }}
nav {{ margin-top: 1em }}
nav a {{ margin-right: 0.8em; white-space: nowrap }}
img {{ max-width: 100%; height: auto; display: block; margin: 0.8em 0 }}
table {{ border-collapse: collapse; font-size: 0.85em; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: 0.15em 0.8em; border-bottom: 1px solid {GRID};
  white-space: pre }}
th {{ color: {SOFT}; font-weight: normal }}
.text {{ text-align: left; font-family: monospace }}
summary {{ cursor: pointer; color: {SOFT} }}
.soft {{ color: {SOFT} }}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    pictures: Mapping[str, bytes],
) -> str:
    """Return the page.

    Args:
        title: Its heading.
        facts: What it is of, by name.
        sections: Its figures.
        pictures: The PNG of each section, by its name.
    """
    links = " ".join(f'<a href="#{one.name}">{_text(one.title)}</a>' for one in sections)
    rows = "".join(
        f'<tr><th class="text">{_text(name)}</th><td class="text">{_text(value)}</td></tr>'
        for name, value in facts.items()
    )
    body = "".join(_section(one, pictures[one.name]) for one in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{_CSS}</style></head><body>"
        f"<h1>{_text(title)}</h1><table>{rows}</table><nav>{links}</nav>{body}"
        f'<p class="soft">moescope {__version__}</p></body></html>\n'
    )


def _section(section: Section, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    more = len(section.lines) - _MAX_LINES
    rest = f'<p class="soft">{more:,} more lines in {section.name}.csv</p>' if more > 0 else ""
    return (
        f'<h2 id="{section.name}">{_text(section.title)}</h2><p>{_text(section.about)}</p>'
        f'<img alt="{_text(section.title)}" src="data:image/png;base64,{data}">'
        f"<details><summary>{section.name}.csv</summary>{_table(section)}{rest}</details>"
    )


def _table(section: Section) -> str:
    head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in section.header)
    lines = "".join(
        f"<tr>{''.join(_cell(one) for one in line)}</tr>" for line in section.lines[:_MAX_LINES]
    )
    return f"<table><tr>{head}</tr>{lines}</table>"


def _cell(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, str):
        return f'<td class="text">{_text(value)}</td>'
    return f"<td>{value:,}</td>" if isinstance(value, int) else f"<td>{value:.4g}</td>"


def _text(value: str) -> str:
    return html.escape(escaped(value))
