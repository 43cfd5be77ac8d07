"""The file of the route log: it may be full, moved, emptied or deleted while it is written."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from pathlib import Path

KEPT_FILES = 9
"""Numbered files that are kept beside the one that is written: ``path.1``, the newest, to
``path.9``."""


def check_log(path: Path, max_bytes: int | None = None) -> None:
    """Check that a log can be written, and numbered where it shall be; makes the file.

    Raises:
        OSError: It cannot, or is not a regular file; ``filename`` says what cannot be written.
    """
    os.close(open_log(path))
    if max_bytes is not None and not os.access(path.parent, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


def open_log(path: Path) -> int:
    """Open a file to append to; one that is not there is made, for its owner alone.

    Never waits, as opening a pipe would.

    Returns:
        The file descriptor.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket's
            raise
        raise _irregular(path) from None
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise _irregular(path)


def _irregular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "it is not a regular file", str(path))


class LogFile:
    """Appends lines; every file begins with a line of its own, the meta line. For one thread.

    Before each write it looks whether the file is still at its path. One that was moved or deleted
    is made anew, and one that was emptied begins anew. An error leaves the lines as they are: the
    next `flush` goes on at the byte where the last one stopped, or in another file at the beginning
    of that line, so that no line is torn within a file.

    Args:
        path: Where it is.
        max_bytes: Size at which it becomes ``path.1``, that one ``path.2`` and so on, up to
            `KEPT_FILES`; None: it grows. A line that is longer has a file of its own.
    """

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._meta = b""
        self._file: int | None = None
        self._size = 0
        self._is_begun = False
        self._has_lines = False
        self._head = b""  # what the file's beginning still lacks
        self._lines = b""
        self._sent = 0

    def begin(self, meta: bytes) -> None:
        """Set the meta line; called once, before any other line."""
        self._meta = meta

    def put(self, lines: bytes) -> None:
        """Set what `flush` writes: whole lines. What was put before is written by now."""
        self._lines, self._sent = lines, 0

    def flush(self) -> None:
        """Write what was put, or the rest of it.

        Raises:
            OSError: It is not written to its end, such as on a full disk; it can be tried again.
        """
        self._follow()
        while self._head or self._sent < len(self._lines):
            if self._head:
                self._head = self._head[self._append(self._head) :]
            elif (end := self._fitting()) is not None:
                self._has_lines = True
                self._sent += self._append(self._lines[self._sent : end])
            else:
                self._rotate()
                self._begin()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None

    def _append(self, data: bytes) -> int:
        written = os.write(self._opened(), data)
        self._size += written
        return written

    def _opened(self) -> int:
        if self._file is None:
            self._file, self._size, self._is_begun = open_log(self._path), 0, False
        return self._file

    def _follow(self) -> None:
        if not self._is_there():
            self.close()
        size = os.fstat(self._opened()).st_size
        if size < self._size:  # emptied, for a copy that was made of it
            self._is_begun = False
        self._size = size
        if not self._is_begun:
            self._begin()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._opened()))
        except FileNotFoundError:
            return False

    def _begin(self) -> None:
        """Let the lines follow on a meta line, and that one on whole lines."""
        self._sent = self._lines.rfind(b"\n", 0, self._sent) + 1
        # What a killed collector or a full disk cut off is not continued.
        is_torn = self._size > 0 and os.pread(self._opened(), 1, self._size - 1) != b"\n"
        head = b"\n" * is_torn + self._meta
        if self._max_bytes is not None and 0 < self._max_bytes - len(head) < self._size:
            self._rotate()
            head = self._meta
        self._head, self._has_lines, self._is_begun = head, self._size > 0, True

    def _fitting(self) -> int | None:
        """Return up to where the lines fit into this file; None: the next file is due."""
        if self._max_bytes is None:
            return len(self._lines)
        room = max(0, self._max_bytes - self._size)
        end = self._lines.rfind(b"\n", self._sent, self._sent + room) + 1
        if end > self._sent:
            return end
        is_within_line = self._sent > 0 and self._lines[self._sent - 1] != b"\n"[0]
        if is_within_line or not self._has_lines:
            return self._lines.index(b"\n", self._sent) + 1
        return None

    def _rotate(self) -> None:
        names = [self._path, *(Path(f"{self._path}.{n}") for n in range(1, KEPT_FILES + 1))]
        for newer, older in reversed(list(itertools.pairwise(names))):
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)
        self.close()
        self._size = os.fstat(self._opened()).st_size
