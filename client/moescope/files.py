"""Files that commands write: each is there as a whole, or stays as it was."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from moescope.errors import CommandError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to in place of a file; it becomes that file when the block ends.

    Where the block raises, the file stays as it was. The path given has the file's suffix and lies
    in its directory. A link's target is replaced, not the link; what is no regular file, such as
    ``/dev/stdout``, is given itself.

    Args:
        path: The file.

    Raises:
        OSError: The new file cannot take the place of the old one.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = path.resolve()
    new = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        yield new
        if target.exists():
            new.chmod(target.stat().st_mode)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a file; a reader sees the whole old one or the whole new one.

    Raises:
        OSError: It cannot be written.
    """
    with replacing(path) as new:
        new.write_bytes(data)


def check_writable(path: Path) -> None:
    """Check that a file can be written, before the work whose result it will hold.

    A file that is there may be replaced; the directory must be there. Nothing is made or changed.

    Raises:
        CommandError: It cannot be written; the message says why.
    """
    folder = path.resolve().parent
    if path.is_dir():
        reason = "it is a directory"
    elif not folder.exists():
        reason = f"there is no directory {folder}"
    elif not folder.is_dir():
        reason = f"{folder} is not a directory"
    elif not os.access(path if _is_device(path) else folder, os.W_OK):
        reason = f"no permission to write {'to it' if _is_device(path) else f'in {folder}'}"
    elif path.exists() and not os.access(path, os.W_OK):
        reason = "it is write-protected"
    else:
        return
    raise CommandError(f"cannot write {path}: {reason}")


def folder_of(path: Path) -> Path:
    """Return a directory, or the nearest above it that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.is_dir())


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file()
