"""Who may ask moescope's endpoints what: the server's own API keys, and the admin key.

vLLM's middleware guards ``/v1``, ``/v2``, ``/inference`` and ``/cohere`` alone.
Source: vLLM 0.32.0, ``entrypoints/serve/middleware/authenticate.py`` and ``register.py``.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from starlette.datastructures import Headers

from moescope_service.errors import RefusedError
from moescope_service.settings import Settings, flag

_OWNER_BYTES = 16
_NOBODY = ""
"""An owner that made nothing; see `moescope_service.queries.RoutesQuery.owner`."""


def server_keys(args: Namespace) -> list[str]:
    """Return the API keys that vLLM itself takes, from its flags or ``VLLM_API_KEY``."""
    from vllm import envs

    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def check_private(args: Namespace, settings: Settings) -> None:
    """Refuse users of their own where nothing tells them apart.

    Raises:
        RefusedError: ``--routes-private on`` without an API key.
    """
    if settings.is_private and not server_keys(args):
        raise RefusedError(
            f"{flag('private')} on: the server has no API keys to tell its users apart by: give "
            "each of them one with --api-key"
        )


class Keys:
    """The keys of a deployment, and what each may do.

    Args:
        args: The server's parsed flags.
        settings: Whether users are kept apart, and the admin key.
        salt: The deployment's secret, `moescope_service.runtime.owner_salt`.

    Raises:
        RefusedError: As of `check_private`.
    """

    def __init__(self, args: Namespace, settings: Settings, salt: bytes) -> None:
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

        check_private(args, settings)
        keys, admin = server_keys(args), [settings.admin_key] if settings.admin_key else []
        self.is_open = not keys
        """Whether the server asks for no key."""
        self.is_private = settings.is_private
        self._salt = salt
        self._has_admin = bool(admin)
        self._knows = AuthenticationMiddleware(None, [*keys, *admin]).verify_token
        self._knows_admin = AuthenticationMiddleware(None, admin).verify_token

    def check(self, headers: Headers) -> None:
        """Let a request in that sends one of the keys, if the server has any.

        Raises:
            HTTPException: 401, it sends none of them.
        """
        if not self.is_open and not self._knows(headers):
            raise HTTPException(
                401,
                "no valid API key: send the header 'Authorization: Bearer KEY' with a key of this "
                "server (--api-key)",
                {"WWW-Authenticate": "Bearer"},
            )

    def check_admin(self, headers: Headers) -> None:
        """Let a request in that sends the admin key, if there is one.

        Raises:
            HTTPException: 403, it does not.
        """
        if self._has_admin and not self._knows_admin(headers):
            raise HTTPException(
                403,
                "this is the admin's: send the header 'Authorization: Bearer KEY' with the key of "
                f"{flag('admin_key')}",
            )

    def owner(self, headers: Headers) -> str | None:
        """Return whose key a request sends, as a keyed hash; None where it sends none of ours.

        vLLM guards some of its endpoints with no key, and those may make traces too.
        """
        if self.is_open or not self._knows(headers):
            return None
        key = headers.get("authorization", "").partition(" ")[2]
        return hashlib.blake2b(key.encode(), key=self._salt, digest_size=_OWNER_BYTES).hexdigest()

    def reader(self, headers: Headers) -> str | None:
        """Return the only owner whose traces a request may read; None: everyone's."""
        return self._owner_unless_admin(headers) if self.is_private else None

    def deleter(self, headers: Headers) -> str | None:
        """Return the only owner whose traces a request may delete; None: everyone's."""
        return self._owner_unless_admin(headers) if self.is_private or self._has_admin else None

    def _owner_unless_admin(self, headers: Headers) -> str | None:
        return None if self._knows_admin(headers) else self.owner(headers) or _NOBODY


def keys_of(request: Request) -> Keys:
    """Return the app's keys."""
    keys: Keys = request.app.state.moescope_keys
    return keys


async def _reader(request: Request) -> str | None:
    return keys_of(request).reader(request.headers)


async def _deleter(request: Request) -> str | None:
    return keys_of(request).deleter(request.headers)


async def _admin(request: Request) -> None:
    keys_of(request).check_admin(request.headers)


ReaderDep = Annotated[str | None, Depends(_reader)]
"""The only owner whose traces the request may read; None: everyone's."""
DeleterDep = Annotated[str | None, Depends(_deleter)]
"""The only owner whose traces the request may delete; None: everyone's."""
ADMIN = Depends(_admin)
"""Wants the admin key, where there is one."""
