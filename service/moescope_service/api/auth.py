"""Guards moescope's endpoints with the server's own API keys.

vLLM's middleware guards ``/v1``, ``/v2``, ``/inference`` and ``/cohere`` alone.
Source: vLLM 0.32.0, ``entrypoints/serve/middleware/authenticate.py`` and ``register.py``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Awaitable, Callable

from fastapi import HTTPException, Request


def require_api_key(args: Namespace) -> Callable[[Request], Awaitable[None]]:
    """Return a FastAPI dependency that wants one of the server's keys, if it has any.

    Args:
        args: The server's parsed flags.
    """
    from vllm import envs
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    verify = AuthenticationMiddleware(None, keys).verify_token

    async def require(request: Request) -> None:
        if keys and not verify(request.headers):
            raise HTTPException(
                401,
                "no valid API key: send the header 'Authorization: Bearer KEY' with a key of this "
                "server (--api-key)",
                {"WWW-Authenticate": "Bearer"},
            )

    return require
