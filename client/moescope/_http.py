"""The seam to HTTP: foreign errors become moescope's here, and nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import orjson

from moescope.errors import (
    AuthenticationError,
    CollectorDownError,
    CommandError,
    ConnectionFailedError,
    FormatError,
    InvalidQueryError,
    RequestNotFoundError,
    ServerError,
    StillRunningError,
    TraceEvictedError,
)

_ERRORS: dict[int, type[ServerError]] = {
    202: StillRunningError,
    401: AuthenticationError,
    404: RequestNotFoundError,
    410: TraceEvictedError,
    422: InvalidQueryError,
    503: CollectorDownError,
}
_MAX_BODY_CHARS = 300


def headers(api_key: str | None) -> dict[str, str]:
    """Return the header that carries the API key, if there is one.

    Raises:
        CommandError: The key has characters that a header cannot carry.
    """
    if api_key and not api_key.isascii():
        raise CommandError("the API key has characters other than ASCII: a header cannot carry it")
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def uses_environment(base_url: str) -> bool:
    """Return whether httpx is to heed the environment's proxies: not on the way to this machine."""
    return httpx.URL(base_url).host not in {"localhost", "127.0.0.1", "::1"}


def error_message(response: httpx.Response) -> str:
    """Return the server's own words: vLLM's error, FastAPI's detail, or the start of the body."""
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        body = None
    words = body.get("error") or body.get("detail") if isinstance(body, dict) else None
    if isinstance(words, dict):
        words = words.get("message")
    if isinstance(words, list):
        words = "; ".join(map(_validation_message, words))
    return str(words or response.text[:_MAX_BODY_CHARS].strip() or response.reason_phrase)


def _validation_message(item: object) -> str:
    if not isinstance(item, dict):
        return str(item)
    where = ".".join(map(str, item.get("loc", ())))
    return f"{where}: {item.get('msg')}" if where else str(item.get("msg"))


def check(response: httpx.Response, *, one_request: bool = False) -> None:
    """Raise what an answer other than 200 means.

    Args:
        response: The answer, read to its end.
        one_request: Whether the URL names one request, so that 404 speaks of that request.

    Raises:
        ServerError: Or the subclass that belongs to the status.
    """
    status = response.status_code
    if status == 200:
        return
    where = f"HTTP {status} from {response.request.method} {response.request.url}"
    if status == 202:
        raise StillRunningError(f"the request has not finished ({where})", status)
    message = f"{error_message(response)} ({where})"
    if status == 404 and not one_request:
        raise ServerError(f"{message}: is the server started with `moescope serve`?", status)
    raise _ERRORS.get(status, ServerError)(message, status)


@contextlib.contextmanager
def transport_errors(base_url: str) -> Iterator[None]:
    """Turn httpx's errors about the connection into moescope's.

    Raises:
        ConnectionFailedError: In place of any of them.
    """
    try:
        yield
    except httpx.TimeoutException as error:
        raise ConnectionFailedError(
            f"no answer from {base_url} in time ({type(error).__name__})"
        ) from error
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise ConnectionFailedError(
            f"cannot reach {base_url}: {str(error) or type(error).__name__}"
        ) from error


def json_object(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object in an answer.

    Raises:
        FormatError: The body is something else.
    """
    try:
        values = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise FormatError(
            f"{response.request.url} did not answer with a JSON object, "
            f"but {response.text[:_MAX_BODY_CHARS]!r}"
        )
    return values
