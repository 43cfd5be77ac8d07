"""The directory of this process's deployment, named by an environment variable.

It holds a file that names its maker: the process that made it, and whose deployment it is. The
collector may be bound in a directory without one, which other programs made.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import stat
import tempfile
from pathlib import Path

from moescope_service.processes import Process
from moescope_service.settings import RUNTIME_DIR

logger = logging.getLogger("moescope")

_PREFIX = "moescope-"
_MAKER = "maker"
_FALLBACK = "/tmp"  # noqa: S108 - where TMPDIR is too long a path
_MAX_DIRECTORY_CHARS = 90
"""A socket's path is at most 107 characters long."""


def make() -> str:
    """Make a private directory whose path leaves room for a socket's name; return the path.

    The calling process is its maker.
    """
    directory = tempfile.mkdtemp(prefix=_PREFIX)
    if len(directory) > _MAX_DIRECTORY_CHARS:
        Path(directory).rmdir()
        directory = tempfile.mkdtemp(prefix=_PREFIX, dir=_FALLBACK)
    Path(directory, _MAKER).write_text(str(Process.current()))
    return directory


def remove(directory: Path) -> None:
    """Remove what moescope made in a directory, and the directory if nothing else is in it."""
    if (directory / _MAKER).exists():
        shutil.rmtree(directory, ignore_errors=True)
        return
    for name in ("collector.sock", "archive.sock", "refused", "salt"):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another program's files are not moescope's to remove
        directory.rmdir()


def is_ours(directory: str) -> bool:
    """Whether a directory that this process inherited is that of its own deployment.

    The maker and the processes that vLLM starts with ``multiprocessing`` share it. Every other
    program with the variable in its environment, such as a server that a script with a model of its
    own starts, is a deployment of its own.
    """
    maker = _maker_of(Path(directory))
    if maker is None or not maker.is_alive:
        return False
    if maker.pid == os.getpid():
        return True
    return multiprocessing.parent_process() is not None and maker.is_ancestor


def sweep() -> None:
    """Remove the directories of deployments that were killed altogether.

    Only this user's, and only those whose maker has ended for certain. One that is being made has
    no maker yet, and is left alone.
    """
    for parent in {tempfile.gettempdir(), _FALLBACK}:
        for directory in Path(parent).glob(f"{_PREFIX}*"):
            if _is_private(directory) and (maker := _maker_of(directory)) and maker.is_dead:
                logger.info("removing %s, which a killed deployment left behind", directory)
                shutil.rmtree(directory, ignore_errors=True)


def _is_private(directory: Path) -> bool:
    try:
        found = directory.lstat()
    except OSError:  # another process swept it
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _maker_of(directory: Path) -> Process | None:
    try:
        return Process.parse((directory / _MAKER).read_text()) if _is_private(directory) else None
    except (OSError, ValueError):
        return None


def address_in(directory: str) -> str:
    """Return the address at which the collector of a directory is bound."""
    return f"ipc://{directory}/collector.sock"


def collector_address() -> str:
    """Return the address at which the collector of this process's deployment is bound."""
    return address_in(os.environ[RUNTIME_DIR])


def archive_beside(address: str) -> str:
    """Return the address of the archive's process in the deployment of a collector.

    Args:
        address: That of the collector.
    """
    return f"{address.rpartition('/')[0]}/archive.sock"


def archive_address() -> str:
    """Return the address at which the archive's process of this deployment is bound."""
    return archive_beside(collector_address())
