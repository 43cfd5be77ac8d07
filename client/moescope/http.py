"""The seam to HTTP: who is reached and how, and moescope's errors in place of foreign ones.

`connect` and `connect_async` make every HTTP client of moescope: none of them uses a proxy on the
way to this machine, whose certificates are verified as others' are; what fails on the way raises
`ConnectionFailedError`, and no response is read beyond its bounds (`moescope.bodies`). The load
test has connections of its own, for speed (`moescope.bench.connections`), with the headers and
messages of this module.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import math
from typing import Any
from urllib.parse import quote

import httpx

from moescope import addresses, bodies, received
from moescope.addresses import Verify
from moescope.errors import (
    AuthenticationError,
    CollectorDownError,
    CommandError,
    ConnectionFailedError,
    FormatError,
    InvalidQueryError,
    PermissionDeniedError,
    RequestNotFoundError,
    ServerError,
    StillRunningError,
    TraceEvictedError,
)
from moescope.failures import transport_errors

_ERRORS: dict[int, type[ServerError]] = {
    202: StillRunningError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: RequestNotFoundError,
    410: TraceEvictedError,
    422: InvalidQueryError,
    503: CollectorDownError,
}
IS_STREAM = "moescope.is_stream"
"""Extension of a request whose response is not read, unless it is an error."""
_NO_SUCH_PAGE = {404, 405, 501}
_MAX_MODELS = 20
_MAX_WORDS = 2000


class _Client(httpx.Client):
    """Raises moescope's errors about the connection, and reads responses within bounds."""

    max_bytes = received.MAX_BYTES

    def request(self, *args: Any, **kwargs: Any) -> httpx.Response:  # noqa: ANN401
        with transport_errors(str(self.base_url).rstrip("/")):
            return super().request(*args, **kwargs)

    def send(self, request: httpx.Request, **kwargs: Any) -> httpx.Response:  # noqa: ANN401
        response = super().send(request, **{**kwargs, "stream": True})
        if _is_stream(response):
            return response
        return bodies.read(response, self.max_bytes, self.timeout.read or math.inf)


class _AsyncClient(httpx.AsyncClient):
    """Raises moescope's errors about the connection, and reads responses within bounds."""

    max_bytes = received.MAX_BYTES

    async def request(self, *args: Any, **kwargs: Any) -> httpx.Response:  # noqa: ANN401
        with transport_errors(str(self.base_url).rstrip("/")):
            return await super().request(*args, **kwargs)

    async def send(self, request: httpx.Request, **kwargs: Any) -> httpx.Response:  # noqa: ANN401
        response = await super().send(request, **{**kwargs, "stream": True})
        if _is_stream(response):
            return response
        return await bodies.aread(response, self.max_bytes, self.timeout.read or math.inf)


def _is_stream(response: httpx.Response) -> bool:
    return response.status_code == 200 and IS_STREAM in response.request.extensions


def connect(
    base_url: str,
    api_key: str | None = None,
    timeout_s: float = 60.0,
    transport: httpx.BaseTransport | None = None,
    max_bytes: int = received.MAX_BYTES,
    verify: Verify = True,
) -> httpx.Client:
    """Return an HTTP client of one server; its requests raise `ConnectionFailedError`.

    Args:
        base_url: The server's address, with or without ``/v1``.
        api_key: The server's API key, if it needs one.
        timeout_s: Seconds to wait for each part of a response.
        transport: httpx's transport, in place of the network.
        max_bytes: Bytes that a response may have, as sent and decompressed.
        verify: How the server's certificate is verified.

    Raises:
        ConnectionFailedError: The address is malformed.
        CommandError: A header cannot carry the API key, or certificates cannot be read.
    """
    with transport_errors(base_url):
        client = _Client(
            **_settings(base_url, api_key, timeout_s, verify),
            transport=transport,
        )
    client.max_bytes = max_bytes
    return client


def connect_async(
    base_url: str,
    api_key: str | None = None,
    timeout_s: float = 600.0,
    transport: httpx.AsyncBaseTransport | None = None,
    max_bytes: int = received.MAX_BYTES,
    verify: Verify = True,
) -> httpx.AsyncClient:
    """Return the asynchronous twin of `connect`, with any number of connections.

    Raises:
        ConnectionFailedError: The address is malformed.
        CommandError: A header cannot carry the API key, or certificates cannot be read.
    """
    with transport_errors(base_url):
        client = _AsyncClient(
            **_settings(base_url, api_key, timeout_s, verify),
            limits=httpx.Limits(max_connections=None),
            transport=transport,
        )
    client.max_bytes = max_bytes
    return client


def _settings(
    base_url: str, api_key: str | None, timeout_s: float, verify: Verify
) -> dict[str, Any]:
    url = httpx.URL(addresses.base_url(base_url))
    if url.scheme not in ("http", "https") or not url.host:
        raise ConnectionFailedError(
            f"no address of a server: {base_url!r}; expected one such as http://localhost:8000"
        )
    return {
        "base_url": url,
        "headers": bodies.ENCODING | headers(api_key),
        "timeout": timeout_s,
        "trust_env": not addresses.is_this_machine(url),
        "verify": addresses.tls_context(url, verify),
    }


def headers(api_key: str | None) -> dict[str, str]:
    """Return the header that carries the API key, if there is one.

    Raises:
        CommandError: The key has characters that a header cannot carry.
    """
    if not api_key:
        return {}
    if not api_key.isascii() or not api_key.isprintable() or api_key != api_key.strip():
        raise CommandError(
            "invalid API key: expected printable ASCII without spaces at the ends; a header cannot "
            "carry other characters"
        )
    return {"Authorization": f"Bearer {api_key}"}


def routes_path(request_id: str) -> str:
    """Return the path of a request's routes; an id may hold slashes, or be ``..``.

    Raises:
        ValueError: The id is empty.
    """
    if not request_id:
        raise ValueError("the request id is empty")
    return "/routes/" + quote(request_id, safe="").replace(".", "%2E")


def first_model(response: httpx.Response) -> str:
    """Return the first model in a response of ``/v1/models``.

    Raises:
        ServerError: The status is not 200.
        FormatError: The response lists no model.
    """
    return _models(response)[0]


def served_model(response: httpx.Response, wanted: str | None = None) -> str:
    """Return the model to ask for, before anything is asked.

    Args:
        response: The server's response to ``GET /v1/models``.
        wanted: The model's name; the first that the server lists where None. It is not checked
            where the server has no list.

    Raises:
        ServerError: The status is not 200.
        FormatError: The response lists no model.
        CommandError: The server does not serve the wanted one.
    """
    if wanted is None:
        return first_model(response)
    if response.status_code in _NO_SUCH_PAGE:
        return wanted
    names = _models(response)
    if wanted not in names:
        listed = ", ".join(received.shown(name, 80) for name in names[:_MAX_MODELS])
        more = f" and {len(names) - _MAX_MODELS} more" if len(names) > _MAX_MODELS else ""
        raise CommandError(
            f"invalid --model {wanted!r}: {response.request.url} lists {listed}{more}"
        )
    return wanted


def _models(response: httpx.Response) -> list[str]:
    check_openai(response)
    values = json_object(response)
    try:
        names = [one["id"] for one in values["data"]]
    except (LookupError, TypeError):
        names = []
    if not names or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{response.request.url} lists no model: {_start(response)!r}")
    return names


def error_message(response: httpx.Response) -> str:
    """Return the server's own words: vLLM's error, FastAPI's detail, or the start of the body.

    Whatever the server sent, they are short and hold no control characters.
    """
    try:
        words = received.error_words(received.parse_json(response.content, bodies.ERROR_BYTES))
    except FormatError:
        words = None
    said = received.shown(words, _MAX_WORDS) if words else _start(response)
    return said + _key_hint(response) if response.status_code == 401 else said


def _key_hint(response: httpx.Response) -> str:
    is_sent = "Authorization" in response.request.headers
    said = "this API key is not one of the server's" if is_sent else "no API key was sent"
    return f": {said}; give --api-key (api_key in Python) or set VLLM_API_KEY"


def _start(response: httpx.Response) -> str:
    """Return the start of a response's body, or its reason where it has none."""
    start = received.text(response.content[:1000]).strip()
    return received.shown(start or response.reason_phrase)


def check(response: httpx.Response, *, one_request: bool = False) -> None:
    """Raise what a status other than 200 of one of moescope's endpoints means.

    Args:
        response: The response, read to its end.
        one_request: Whether the URL names one request, so that 404 speaks of that request.

    Raises:
        ServerError: Or the subclass that belongs to the status.
    """
    status = response.status_code
    if status == 200:
        return
    if status == 202:
        raise StillRunningError(f"the request has not finished ({_where(response)})", status)
    message = f"{error_message(response)} ({_where(response)})"
    if status == 404 and not one_request:
        raise ServerError(f"{message}: is the server started with `moescope serve`?", status)
    raise _ERRORS.get(status, ServerError)(message, status, _retry_after_s(response))


def check_line(values: dict[str, Any]) -> None:
    """Raise what a line of a stream means that says that it cannot go on.

    Raises:
        ServerError: Or the subclass that belongs to its status.
    """
    if "error" in values:
        error = values["error"]
        status = error.get("code") if isinstance(error, dict) else None
        status = status if isinstance(status, int) else 500
        words = received.error_words(values) or f"the stream ended with {received.shown(error)}"
        raise _ERRORS.get(status, ServerError)(received.shown(words, _MAX_WORDS), status)


def _retry_after_s(response: httpx.Response) -> float | None:
    """Return the seconds of a ``Retry-After``; None where there is none, or no valid one."""
    value = response.headers.get("Retry-After", "")[:40]
    if value.isdecimal():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, (until - dt.datetime.now(dt.UTC)).total_seconds())
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None


def check_openai(response: httpx.Response) -> None:
    """Raise what a status other than 200 of one of OpenAI's endpoints means.

    Raises:
        AuthenticationError: The status is 401.
        PermissionDeniedError: It is 403.
        ServerError: It is another.
    """
    if response.status_code != 200:
        kind = _ERRORS[response.status_code] if response.status_code in (401, 403) else ServerError
        raise kind(f"{error_message(response)} ({_where(response)})", response.status_code)


def _where(response: httpx.Response) -> str:
    return f"HTTP {response.status_code} from {response.request.method} {response.request.url}"


def json_object(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object in a response.

    Raises:
        FormatError: The body is something else.
    """
    try:
        max_bytes = response.extensions.get("max_bytes", received.MAX_BYTES)
        values = received.parse_json(response.content, max_bytes)
    except FormatError as error:
        raise FormatError(f"{response.request.url} returned no JSON object: {error}") from error
    if not isinstance(values, dict):
        raise FormatError(
            f"{response.request.url} returned no JSON object, but {_start(response)!r}"
        )
    return values
