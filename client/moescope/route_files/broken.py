"""Errors of reading damaged files, whatever raises them, as ours."""

from __future__ import annotations

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from moescope.errors import FormatError, MoescopeError
from moescope.received import MALFORMED, shown

_BROKEN = (
    *(*MALFORMED, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(MemoryError, RuntimeError),  # NotImplementedError: of a compression that is none
)
"""What numpy, zipfile and pyarrow raise of damaged bytes."""


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Raise errors of reading a file as ours, with its name.

    Raises:
        CommandError: As it was raised.
        FormatError: The file is broken.
    """
    try:
        yield
    except MoescopeError as error:
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise type(error)(message) from error
    except _BROKEN as error:
        raise FormatError(f"{path}: no file of routes: {shown(error)}") from error
