"""The page as one file: its scripts and styles inline, allowed by their hashes and nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping

from moescope.errors import CommandError
from moescope.view.bundle import bundle

_CHARSET = '<meta charset="utf-8">'
_STYLE = '<link rel="stylesheet" href="moescope/page/style.css">'
_SCRIPT = '<script type="module" src="moescope/page/app.js"></script>'
_END = "</body>"


def render(page: Mapping[str, str], data: bytes) -> str:
    """Return the page of a server with data in it.

    Args:
        page: The text of the page's files, by name.
        data: What `moescope.view.pack` made; it stands in the file as base64, which holds no
            markup.

    Raises:
        CommandError: The page's files are not as they are expected here.
    """
    script = bundle(page, "app.js")
    style = page["style.css"]
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    saved = base64.b64encode(data).decode()
    html = page["index.html"]
    for place, text in (
        (_CHARSET, f'{_CHARSET}\n<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        (_STYLE, f"<style>{style}</style>"),
        (_SCRIPT, f'<script type="module">{script}</script>'),
        (_END, f'<script type="application/gzip" id="saved">{saved}</script>\n{_END}'),
    ):
        if html.count(place) != 1:
            raise CommandError(f"the page's index.html has {html.count(place)} of {place}")
        html = html.replace(place, text)
    return html


def _hash(text: str) -> str:
    """Return a source expression of a Content-Security-Policy.

    Source: W3C, Content Security Policy Level 3, 2.3.1.
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
