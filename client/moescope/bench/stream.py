"""Reads the streamed responses of OpenAI's API."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import orjson

from moescope.received import is_int, shown, text

_DONE = b"[DONE]"
_MAX_EVENT_BYTES = 16 * 2**20
_SHOWN_BYTES = 200
_OUTPUTS = ("content", "reasoning", "reasoning_content", "tool_calls", "function_call", "refusal")


class StreamError(Exception):
    """A response with the status 200 is not a whole one."""

    kind: ClassVar[str]
    """What it is counted as; see `MeasuredRequest.error_kind`."""


class MalformedStreamError(StreamError):
    """The stream is not what OpenAI's API sends."""

    kind = "malformed"


class EmptyStreamError(StreamError):
    """The response has no byte."""

    kind = "empty"


class NoTokenError(StreamError):
    """The stream has ended, and no token was in it."""

    kind = "no_token"


class NoUsageError(StreamError):
    """The stream does not say how many tokens there are."""

    kind = "no_usage"


class ServerStreamError(StreamError):
    """The server sent an error within the stream."""

    kind = "server_error"


class AbortedError(StreamError):
    """The server ended the response before it was whole."""

    kind = "aborted"


_FAILED: dict[str | None, type[StreamError]] = {"error": ServerStreamError, "abort": AbortedError}
# Source: vLLM 0.32.0, vllm/v1/engine/__init__.py, FinishReason: the others end a whole response.


class Event(NamedTuple):
    """A server-sent event."""

    data: bytes
    is_error: bool = False
    """Whether the event is named ``error``."""


class EventParser:
    """Splits bytes into server-sent events, wherever the parts are cut.

    Lines end with LF or CR LF; comments and other fields than ``data`` and ``event`` are skipped.
    A line ``data: [DONE]`` is an event of its own, and ends the one before it, though servers leave
    out the blank lines.

    Source: WHATWG HTML, section 9.2.6, "Interpreting an event stream".

    Args:
        max_bytes: Bytes that may come without ending an event.
    """

    def __init__(self, max_bytes: int = _MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = b""
        self._data: list[bytes] = []
        self._is_error = False
        self._num_bytes = 0  # since the last event
        self._start = b""  # what came before the first event
        self._any = False

    def feed(self, part: bytes) -> list[Event]:
        """Return the events that this part ends.

        Raises:
            MalformedStreamError: Too many bytes held no event.
        """
        self._num_bytes += len(part)
        if self._num_bytes > self._max_bytes:
            raise MalformedStreamError(f"{self._num_bytes:,} bytes without an event")
        *lines, self._rest = (self._rest + part).split(b"\n")
        events: list[Event] = []
        for full_line in lines:
            line = full_line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data = line[5:].removeprefix(b" ")
                if data == _DONE:
                    events += [*self._ended(), Event(_DONE)]
                else:
                    self._data.append(data)
            elif line.startswith(b"event:"):
                self._is_error = line[6:].removeprefix(b" ") == b"error"
            elif not line:
                events += self._ended()
        if events:
            self._num_bytes, self._any = len(self._rest), True
        elif not self._any:
            self._start = (self._start + part)[:_SHOWN_BYTES]
        return events

    def end(self) -> list[Event]:
        """Return the events that the stream's end ends: ``[DONE]`` without the end of its line.

        Raises:
            EmptyStreamError: There was no byte.
            MalformedStreamError: There were bytes, but no event.
        """
        events = self.feed(b"\n") if self._rest else []
        if not self._any and not self._start:
            raise EmptyStreamError("the response was empty")
        if not self._any:
            raise MalformedStreamError(f"not a stream of events: {shown(text(self._start))}")
        return events

    def _ended(self) -> list[Event]:
        """Return the event that ends here, if there is one."""
        events = [Event(b"\n".join(self._data), self._is_error)] if self._data else []
        self._data, self._is_error = [], False
        return events


@dataclasses.dataclass(slots=True)
class StreamedResponse:
    """What has arrived of one response.

    A token chunk is a chunk with a choice. A chat's chunk without output is none if it names the
    role, or comes ahead of the first: some servers send those before a token is there. Later ones
    are: of tokens whose text is held back or not shown. A token chunk may hold no token, one or
    several: how many tokens there are is what ``usage`` says.
    """

    chunk_times_s: list[float] = dataclasses.field(default_factory=list)
    """When each token chunk was read, by the clock that the caller reads."""
    text: list[str] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    """Empty where the server does not send them."""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    done: bool = False
    """Whether the stream ended with ``[DONE]``."""

    def take(self, event: Event, now_s: float) -> None:
        """Take one event.

        Raises:
            MalformedStreamError: It is not a chunk of a completion.
            ServerStreamError: It is an error.
        """
        if event.data == _DONE:
            self.done = True
            return
        if event.is_error:
            raise ServerStreamError(_error_words(event.data))
        try:
            values = orjson.loads(event.data)
            if values.get("error") or values.get("object") == "error":
                raise ServerStreamError(_error_words(event.data))
            if usage := values.get("usage"):
                self.prompt_tokens = _count(usage["prompt_tokens"])
                self.completion_tokens = _count(usage["completion_tokens"])
            for choice in values["choices"]:
                self._take_choice(choice, now_s)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise MalformedStreamError(
                f"not a chunk of a completion: {shown(repr(event.data[:_SHOWN_BYTES]))}"
            ) from error

    def _take_choice(self, choice: dict[str, Any], now_s: float) -> None:
        delta = choice.get("delta")
        finish_reason = choice.get("finish_reason")
        token_ids = choice.get("token_ids")
        if delta is None:
            content = choice["text"]
        else:
            content = delta.get("content")
            if (
                not (finish_reason or token_ids or any(map(delta.get, _OUTPUTS)))
                and ("role" in delta or not self.chunk_times_s)
            ):  # fmt: skip
                return
        _check_choice(content or "", token_ids or [], finish_reason or "")
        self.chunk_times_s.append(now_s)
        if content:
            self.text.append(content)
        if token_ids:
            self.token_ids.extend(token_ids)
        if finish_reason and self.finish_reason not in _FAILED:  # one of several choices failed
            self.finish_reason = finish_reason

    def require_whole(self, *, token_ids: bool = False) -> None:
        """Check that the stream had all that a whole response has.

        Args:
            token_ids: Whether token ids are needed too.

        Raises:
            StreamError: The server gave it up, or something is missing.
        """
        if failure := _FAILED.get(self.finish_reason):
            raise failure(f"the server ended the response with the reason {self.finish_reason!r}")
        if not self.done:
            raise MalformedStreamError("the stream ended without [DONE]")
        if not self.chunk_times_s:
            raise NoTokenError("the stream held no token")
        if self.completion_tokens is None:
            raise NoUsageError("the stream held no usage: the tokens are not known")
        if token_ids and not self.token_ids:
            raise MalformedStreamError("the server sent no token ids: the next turn needs them")


def _error_words(data: bytes) -> str:
    """Return what an error's event says: its message, or all of it."""
    try:
        values = orjson.loads(data)
    except orjson.JSONDecodeError:
        return shown(text(data))
    error = (values.get("error") or values) if isinstance(values, dict) else values
    message = error.get("message") if isinstance(error, dict) else None
    return shown(message or error)


def _check_choice(content: object, token_ids: object, finish_reason: object) -> None:
    """Check what is kept of a choice, in well below a microsecond: there is one a token."""
    if not isinstance(content, str) or not isinstance(finish_reason, str):
        raise TypeError("the text and the reason of its end must be text")
    if not isinstance(token_ids, list) or not all(type(one) is int for one in token_ids):
        raise TypeError("token_ids must be integers")


def _count(value: object) -> int:
    if not isinstance(value, int) or not is_int(value) or value < 0:
        raise TypeError(f"expected a number of tokens, got {shown(value, 80)}")
    return value
