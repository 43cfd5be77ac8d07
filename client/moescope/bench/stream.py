"""Reads the streamed answers of OpenAI's API."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson

_DONE = b"[DONE]"


class MalformedStreamError(Exception):
    """The stream is not what OpenAI's API sends."""


class ServerStreamError(Exception):
    """The server sent an error within the stream."""


class EventParser:
    """Splits bytes into the data of server-sent events, wherever the parts are cut.

    Lines end with LF or CR LF; comments and other fields than ``data`` are skipped.

    Source: WHATWG HTML, section 9.2.6, "Interpreting an event stream".
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, part: bytes) -> list[bytes]:
        """Return the data of the events that this part ends."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        events = []
        for full_line in lines:
            line = full_line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


@dataclasses.dataclass(slots=True)
class Answer:
    """What has come of one answer.

    A token chunk is a chunk with a choice, other than one that only names the role: some servers
    send that before the first token is there. It may hold no token, one or several: how many
    tokens there are is what ``usage`` says.
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
    """Whether the stream was ended as it should be."""

    def take(self, data: bytes, now_s: float) -> None:
        """Take the data of one event.

        Raises:
            MalformedStreamError: It is no chunk of a completion.
            ServerStreamError: It is an error.
        """
        if data == _DONE:
            self.done = True
            return
        try:
            values = orjson.loads(data)
            if error := values.get("error"):
                raise ServerStreamError(str(error))
            if usage := values.get("usage"):
                self.prompt_tokens = int(usage["prompt_tokens"])
                self.completion_tokens = int(usage["completion_tokens"])
            for choice in values["choices"]:
                self._take_choice(choice, now_s)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise MalformedStreamError(f"no chunk of a completion: {data[:200]!r}") from error

    def _take_choice(self, choice: dict[str, Any], now_s: float) -> None:
        delta = choice.get("delta")
        finish_reason = choice.get("finish_reason")
        token_ids = choice.get("token_ids")
        if delta is None:
            text = choice["text"]
        else:
            text = delta.get("content")
            said = text or delta.get("reasoning") or delta.get("reasoning_content")
            if "role" in delta and not (said or finish_reason or token_ids):
                return
        self.chunk_times_s.append(now_s)
        if text:
            self.text.append(text)
        if token_ids:
            self.token_ids.extend(token_ids)
        if finish_reason:
            self.finish_reason = finish_reason

    def require_whole(self, *, token_ids: bool = False) -> None:
        """Check that the stream had all that it must have.

        Args:
            token_ids: Whether token ids are among that.

        Raises:
            MalformedStreamError: It has not.
        """
        if not self.done:
            raise MalformedStreamError("the stream ended without [DONE]")
        if not self.chunk_times_s:
            raise MalformedStreamError("the stream held no token")
        if self.completion_tokens is None:
            raise MalformedStreamError("the stream held no usage: the tokens are not known")
        if token_ids and not self.token_ids:
            raise MalformedStreamError("the server sent no token ids: the next turn needs them")
