"""A deployment's directory and collector, from their start to their end."""

from __future__ import annotations

import atexit
import logging
import os
import shutil

from moescope_service.errors import RefusedError
from moescope_service.imports import check_archive
from moescope_service.node_key import make_key
from moescope_service.runtime import directory
from moescope_service.runtime.supervisor import ARCHIVE, Supervisor
from moescope_service.settings import RUNTIME_DIR, Settings

logger = logging.getLogger("moescope")

_started: dict[str, Deployment] = {}
"""Deployments that this process started and did not release, by directory."""


class Deployment:
    """A directory, and the collector that is bound in it.

    The collector ends with the process that started it, or before that at `end`.

    Args:
        path: The directory.
        supervisor: Keeps the collector; None where another process started it.
        archive: Keeps the archive's process, where there is one.
    """

    def __init__(
        self, path: str, supervisor: Supervisor | None = None, archive: Supervisor | None = None
    ) -> None:
        self._path = path
        self._supervisor = supervisor
        self._archive = archive
        self._owner = os.getpid()
        if supervisor is not None:
            atexit.register(self._stop)

    @property
    def address(self) -> str:
        """Where its collector is bound."""
        return directory.address_in(self._path)

    def end(self) -> None:
        """End the collector and remove the directory.

        Does nothing in a process that did not start the collector.
        """
        if self._supervisor is not None:
            atexit.unregister(self._stop)
            self._stop()

    def _stop(self) -> None:
        # A forked child has its parent's objects, and runs its parent's exit handlers.
        if self._supervisor is None or os.getpid() != self._owner:
            return
        self._supervisor.stop()
        if self._archive is not None:  # the collector has handed over the last traces
            self._archive.stop()
        shutil.rmtree(self._path, ignore_errors=True)


def ensure_collector() -> None:
    """Start the deployment's collector, unless this process or one before it did.

    A collector that ends before this process is started again: see `Supervisor`. Another
    deployment's directory, where that is inherited, is left to it.

    Of an engine over several nodes it writes their key, where that is missing.

    Raises:
        RefusedError: It did not start.
    """
    inherited = os.environ.get(RUNTIME_DIR)
    if inherited and directory.is_ours(inherited):
        return
    if inherited:
        logger.warning(
            "%s names %s, which is another deployment's: this one has a directory of its own",
            RUNTIME_DIR, inherited,
        )  # fmt: skip
    settings = Settings.from_env()
    if settings.key_file is not None:
        make_key(settings.key_file)
    directory.sweep()
    check_archive(settings.archive)
    path = os.environ[RUNTIME_DIR] = directory.make()
    supervisor = Supervisor(directory.address_in(path))
    archive = None
    if settings.archive is not None:
        archive = Supervisor(directory.archive_beside(directory.address_in(path)), program=ARCHIVE)
    _started[path] = Deployment(path, supervisor, archive)
    if archive is not None:
        _start(archive, "archive")
    _start(supervisor, "collector")


def _start(supervisor: Supervisor, name: str) -> None:
    try:
        code = supervisor.start()
    except OSError as error:
        release().end()
        raise RefusedError(f"the {name} process cannot be started: {error}") from error
    if code is not None:
        release().end()
        raise RefusedError(
            f"the {name} process did not start; its message stands above (exit code {code})"
        )


def release() -> Deployment:
    """Make room for another deployment: the next `ensure_collector` starts a collector anew.

    The processes of this one go on: they know their collector's address by now.

    Returns:
        This deployment, for the caller to end.
    """
    path = os.environ.pop(RUNTIME_DIR)
    return _started.pop(path, None) or Deployment(path)
