"""The key that the nodes of one engine share: a file of one line, for its owner alone.

It is the secret half of a CURVE key pair, in Z85 (40 characters). Every node has the same file, and
so the same pair: the collector proves by it that it is the collector, and its peers that they are
nodes. Source: ZMQ RFC 26 (CurveZMQ), RFC 32 (Z85).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import stat
import tempfile
from pathlib import Path

import zmq

from moescope_service.errors import RefusedError
from moescope_service.settings import flag

_MAX_BYTES = 4096
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclasses.dataclass(frozen=True, slots=True)
class NodeKey:
    """A CURVE key pair, in Z85."""

    public: bytes
    secret: bytes = dataclasses.field(repr=False)

    @property
    def owner_salt(self) -> bytes:
        """What API keys are hashed with, so that all nodes hash them alike; 32 bytes."""
        return hashlib.blake2b(self.secret, digest_size=32, person=b"moescope owners").digest()


def make_key(path: Path) -> None:
    """Write a new key, unless the file exists; only its owner may read it.

    Raises:
        RefusedError: It cannot be written.
    """
    if path.exists():
        return
    _, secret = zmq.curve_keypair()
    try:
        descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret + b"\n")
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(made, path)
        finally:
            Path(made).unlink()
    except OSError as error:
        raise RefusedError(f"{flag('key_file')}: cannot write {path}: {error.strerror}") from None


def read_key(path: Path) -> NodeKey:
    """Read a key.

    Raises:
        RefusedError: The file is missing, may be read by others than its owner, or holds no key.
    """
    name = f"{flag('key_file')} {path}"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MAX_BYTES).strip()
    except FileNotFoundError:
        raise RefusedError(
            f"{name}: there is no such file: the first node writes it at its start; copy it to "
            "every other node"
        ) from None
    except OSError as error:
        raise RefusedError(f"{name}: cannot be read: {error.strerror}") from None
    if mode & _OTHERS:
        raise RefusedError(
            f"{name}: others than its owner may read or write it (mode {mode & 0o777:04o}): "
            f"chmod 600 {path}"
        )
    try:
        return NodeKey(zmq.curve_public(text), text)
    except (ValueError, zmq.ZMQError):
        raise RefusedError(
            f"{name}: it holds no key: expected one line of 40 characters; remove the file on the "
            "first node, which then writes a new one"
        ) from None
