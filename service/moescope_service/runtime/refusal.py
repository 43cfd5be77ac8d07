"""The file in which a worker leaves why it refuses to capture, for the process that started it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from moescope_service.errors import RefusedError
from moescope_service.settings import RUNTIME_DIR

_NAME = "refused"


def _path() -> Path:
    return Path(os.environ.get(RUNTIME_DIR, os.devnull), _NAME)


@contextlib.contextmanager
def reported_refusal() -> Iterator[None]:
    """Write the reason of a refusal where the deployment's first process finds it."""
    try:
        yield
    except RefusedError as error:
        with contextlib.suppress(OSError):
            _path().write_text(str(error))
        raise


def reported_reason() -> str | None:
    """Return why a worker refused to capture; None where none did."""
    path = _path()
    return path.read_text() if path.exists() else None
