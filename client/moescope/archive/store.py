"""The files of an archive, in a directory or under a prefix of an object store."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import fs

from moescope.archive.layout import Part
from moescope.errors import CommandError

S3 = "s3://"


def check_location(location: str) -> None:
    """Check that a text names a place for an archive.

    Raises:
        CommandError: It is another kind of address, or an incomplete one.
    """
    scheme, separator, rest = location.partition("://")
    if separator and scheme != "s3":
        raise CommandError(
            f"invalid archive {location!r}: expected a directory or s3://bucket/prefix"
        )
    if separator and not all(rest.strip("/").split("/")):
        raise CommandError(f"invalid archive {location!r}: expected s3://bucket/prefix")


class Store:
    """Reads and publishes files; each is there as a whole, or not at all.

    In a directory a file is written under another name, flushed to the disk and renamed; an object
    store makes an object visible once all of it is there.

    Args:
        location: A directory, or ``s3://bucket/prefix``. Credentials, region and endpoint of S3
            come from the environment and AWS' own files.

    Raises:
        CommandError: The location is none.
    """

    def __init__(self, location: str) -> None:
        check_location(location)
        self.is_local = not location.startswith(S3)
        if self.is_local:
            self._files: fs.FileSystem = fs.LocalFileSystem()
            self._root = str(Path(location).expanduser().absolute())
            return
        self._root = location.removeprefix(S3).strip("/")
        self._files = _s3()

    @property
    def path(self) -> Path:
        """The directory."""
        return Path(self._root)

    def parts(self, *, of_servers: bool = False) -> list[tuple[Part, int]]:
        """Return the files and their bytes, in their order.

        Args:
            of_servers: Also those of servers that have a directory of their own in it.

        Raises:
            OSError: They cannot be listed.
        """
        selector = fs.FileSelector(self._root, allow_not_found=True, recursive=True)
        found = []
        for info in self._files.get_file_info(selector):
            part = Part.parse(info.path.removeprefix(self._at("")))
            if part is None or not info.is_file or info.path != self._at(part.path):
                continue
            if of_servers or not part.server:
                found.append((part, int(info.size)))
        return sorted(found)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """Open a file to read.

        Raises:
            OSError: It cannot be opened; FileNotFoundError: it is not there.
        """
        with self._files.open_input_file(self._at(name)) as file:
            yield file

    def put(self, name: str, data: Any) -> None:  # noqa: ANN401
        """Publish a file, in place of an earlier one of that name.

        Args:
            name: Its path in the archive.
            data: An object with the buffer protocol.

        Raises:
            OSError: It cannot be written; nothing is there, or what was there before.
        """
        if not self.is_local:
            with self._files.open_output_stream(self._at(name)) as stream:
                stream.write(data)
            return
        path = Path(self._at(name))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.new")
        try:
            _write(new, data)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        for folder in path.parents[: len(Path(name).parents)]:  # each may be new
            _flush(folder)

    def remove(self, name: str) -> None:
        """Remove a file, and the directories that it leaves empty; one that is gone is no error.

        Raises:
            OSError: It cannot be removed.
        """
        with contextlib.suppress(FileNotFoundError):
            self._files.delete_file(self._at(name))
        if self.is_local:
            parent = Path(self._at(name)).parent
            with contextlib.suppress(OSError):  # there are more
                for folder in (parent, parent.parent):
                    if folder != self.path:
                        folder.rmdir()
            _flush(next(one for one in (parent, *parent.parents) if one.exists()))

    def sweep(self) -> None:
        """Remove what killed writers left behind; for the only one that writes.

        Raises:
            OSError: It cannot be removed.
        """
        if self.is_local:
            for folder in (".", "date=*/hour=*"):
                for left in self.path.glob(f"{folder}/.*.new"):
                    left.unlink(missing_ok=True)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def _s3() -> fs.FileSystem:
    """Return S3 as the environment describes it; pyarrow reads all of that but the endpoint."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, separator, host = endpoint.partition("://")
    options = {"scheme": scheme, "endpoint_override": host.rstrip("/")} if separator else {}
    return fs.S3FileSystem(connect_timeout=5, request_timeout=20, **options)


def _write(path: Path, data: Any) -> None:  # noqa: ANN401
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    finally:
        os.close(file)


def _flush(folder: Path) -> None:
    """Let what was made or removed in a directory be so after the machine fails, too."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
