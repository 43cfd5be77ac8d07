"""What the API servers of a deployment hash API keys with: one secret file for all of them."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from moescope_service.settings import RUNTIME_DIR

_NAME = "salt"
_BYTES = 32


def owner_salt() -> bytes:
    """Return the deployment's salt; the first API server that asks makes it."""
    path = Path(os.environ[RUNTIME_DIR], _NAME)
    if not path.exists():
        descriptor, made = tempfile.mkstemp(dir=path.parent)  # for this user alone
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
        with contextlib.suppress(FileExistsError):  # another API server was first
            os.link(made, path)
        Path(made).unlink()
    return path.read_bytes()
