r"""``prompts.txt``: one prompt a line, as UTF-8 text that can be read and edited.

Within a prompt a newline is written ``\n``, a carriage return ``\r`` and a backslash ``\\``; a
backslash before anything else stands for itself. Writing and reading give the same prompts back.
Blank lines are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from moescope import files
from moescope.errors import DatasetError

_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ORIGINALS = {escape: original for original, escape in _ESCAPES.items()}


def write(path: Path, prompts: Iterable[str]) -> None:
    """Write a prompts file.

    Raises:
        DatasetError: A prompt is blank.
    """
    lines = []
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise DatasetError(f"prompt {number} is blank")
        lines.append(re.sub(r"[\\\n\r]", lambda match: _ESCAPES[match[0]], prompt) + "\n")
    files.write(path, "".join(lines).encode())


def read(path: Path) -> list[str]:
    """Read a prompts file.

    Raises:
        DatasetError: The file cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text") from error
    prompts = [_unescape(line.removesuffix("\r")) for line in lines if line.strip()]
    if not prompts:
        raise DatasetError(f"{path} holds no prompt: expected one per line")
    return prompts


def _unescape(line: str) -> str:
    return re.sub(r"\\[\\nr]", lambda match: _ORIGINALS[match[0]], line)
