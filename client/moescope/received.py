"""What others sent: shown as text, parsed as JSON and checked, within bounds.

A server, a file or whoever stands between may send anything. What is shown of it is short and holds
no control characters; what is parsed has a bound on the memory that it becomes.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from moescope.errors import FormatError

MAX_BYTES = 256 * 2**20
"""Bytes of one response, or of one file's arrays, that are read where the caller sets no bound."""

MAX_EXPERTS = 2**16
"""Experts of a layer: their ids take two bytes."""
MAX_LAYERS = 10_000
"""Layers of a model."""
MAX_TOKENS = 2**31 - 1
"""Tokens of a sequence: positions are int32 in tables."""
MAX_TOP_K = 1024
"""Experts that a layer selects for a token."""

MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What Python and numpy raise of values that are not what the code expects."""

_SHOWN_CHARS = 300
_MAX_VALIDATION_MESSAGES = 5
_PARSED_FACTOR = 4
# Bytes of CPython's objects for each of these characters, at most: an object or list with its head,
# a member of a list, a key and its value.
_PARSED_BYTES = {b"{": 96, b"[": 96, b",": 64, b":": 192}


def text(data: bytes) -> str:
    """Return bytes as text, whatever they are: UTF-8, with replacement characters."""
    return data.decode("utf-8", "replace")


def shown(value: object, limit: int = _SHOWN_CHARS) -> str:
    """Return the start of a text or of another value, safe for a terminal.

    Args:
        value: A text, or what is shown by its ``repr``.
        limit: Characters at most.
    """
    try:
        whole = value if isinstance(value, str) else repr(value)
    except RecursionError:
        whole = f"a {type(value).__name__}, nested too deep to be shown"
    except ValueError as error:  # an integer of thousands of digits
        whole = f"a {type(value).__name__} ({error})"
    return escaped(whole[:limit] + "…" * (len(whole) > limit))


def escaped(whole: str, keep: str = "") -> str:
    r"""Return a text whose control characters are escapes such as ``\x1b``.

    Args:
        whole: The text.
        keep: Characters that stay as they are.
    """
    if whole.isprintable():
        return whole
    return "".join(one if one in keep or _is_visible(one) else _escape(one) for one in whole)


def _is_visible(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def parse_json(data: bytes, max_bytes: int = MAX_BYTES) -> Any:  # noqa: ANN401
    """Parse JSON whose values do not take too much memory.

    ``[[],[],…`` takes 20 times the bytes of its text: what it would take is estimated before.

    Args:
        data: The text.
        max_bytes: The values may take four times as much.

    Raises:
        FormatError: It is no JSON, or too much.
    """
    size = len(data) + sum(each * data.count(char) for char, each in _PARSED_BYTES.items())
    if size > _PARSED_FACTOR * max_bytes:
        raise FormatError(
            f"{len(data):,} bytes of JSON would take about {size:,} bytes of memory: more than "
            f"{_PARSED_FACTOR} x max_bytes={max_bytes:,}"
        )
    try:
        return orjson.loads(data)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"not JSON ({error}): {shown(text(data[:_SHOWN_CHARS]))!r}") from error


def error_words(body: object) -> str | None:
    """Return what JSON of an error says, vLLM's or FastAPI's; None where it has another form."""
    words = body.get("error") or body.get("detail") if isinstance(body, dict) else None
    if isinstance(words, dict):
        words = words.get("message")
    if isinstance(words, list):
        words = "; ".join(map(_validation_message, words[:_MAX_VALIDATION_MESSAGES]))
    return words if isinstance(words, str) else None


def _validation_message(item: object) -> str:
    if not isinstance(item, dict):
        return shown(item)
    where, message = item.get("loc"), shown(item.get("msg"))
    path = ".".join(map(shown, where)) if isinstance(where, list) else ""
    return f"{path}: {message}" if path else message


def check_fields(kind: type, values: Mapping[str, Any]) -> None:
    """Check values that a dataclass is made of, by the annotations of its fields.

    Args:
        kind: The dataclass; fields of other annotations than those of JSON are not checked.
        values: By name; a missing one is not noticed.

    Raises:
        TypeError: A value has another type, or is out of range.
    """
    for name, annotation, checks in _checks(kind):
        if name in values and not any(check(values[name]) for check in checks):
            raise TypeError(f"{name} must be {annotation}, got {shown(values[name], 80)}")


@functools.cache
def _checks(kind: type) -> list[tuple[str, str, list[Callable[[Any], bool]]]]:
    """Return name, annotation and what is valid, of each field whose annotation is known."""
    fields = [(one.name, str(one.type)) for one in dataclasses.fields(kind)]
    return [
        (name, annotation, [_KINDS[one] for one in annotation.split(" | ")])
        for name, annotation in fields
        if _KINDS.keys() >= set(annotation.split(" | "))
    ]


def is_int(value: object) -> bool:
    """Return whether a value is an integer that fits into 64 bits, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def _each(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(kind, value))


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_label_span(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"version", "start", "end"}
        and _is_str(value["version"])
        and is_int(value["start"])
        and is_int(value["end"])
    )


_KINDS: dict[str, Callable[[Any], bool]] = {
    "None": lambda value: value is None,
    "bool": lambda value: isinstance(value, bool),
    "int": is_int,
    "float": lambda value: is_int(value) or isinstance(value, float),
    "str": _is_str,
    "list[int]": _each(is_int),
    "list[str]": _each(_is_str),
    "tuple[int, ...]": _each(is_int),
    "tuple[str, ...]": _each(_is_str),
    "list[LabelSpan]": _each(_is_label_span),
    "dict[str, str]": lambda value: isinstance(value, dict) and all(map(_is_str, value.values())),
}
