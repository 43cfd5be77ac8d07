"""Lists of layers, as options and query parameters have them: ``0,5-7``."""

from __future__ import annotations

import itertools
import re

_RANGE = re.compile(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*")
# Clients of the server write lists too: what one costs is bounded.
_MAX_CHARS = 1000
_MAX_LAYERS = 10_000


def parse_layers(text: str) -> tuple[int, ...]:
    """Return layer numbers for ``0,5-7``, in that order, without repetition.

    Raises:
        ValueError: The text is no list of layers, or too long a one; the message says what was
            expected.
    """
    if len(text) > _MAX_CHARS:
        raise ValueError(
            f"expected at most {_MAX_CHARS} characters, got {len(text)}: give ranges, such as 0,5-7"
        )
    spans = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError("expected layer numbers and ranges, such as 0,5-7")
        spans.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    if sum(map(len, spans)) > _MAX_LAYERS:
        raise ValueError(f"expected at most {_MAX_LAYERS:,} layers: name each one once")
    return tuple(dict.fromkeys(itertools.chain(*spans)))
