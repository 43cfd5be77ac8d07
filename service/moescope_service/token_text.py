"""The text of tokens, by the tokenizer of the server, or of the engine in a script.

Relies on vLLM 0.32.0, ``tokenizers/protocol.py`` (``TokenizerLike``), which Hugging Face's
tokenizers and Mistral's have. What vLLM itself uses for log probabilities
(``tokenizers/detokenizer_utils.py``, ``convert_ids_list_to_tokens``) gives U+FFFD for every part of
a character, and some tokens without their space.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope.trace import RouteTrace

_BEFORE = "a"
"""Stands before a token that is decoded: decoders take the space from the first one."""
_NO_UTF8 = re.compile("[\udc80-\udcff]")
_REPLACED = "\ufffd"
"""What decoders put in place of bytes that are no UTF-8."""


class TokenText:
    """The text of each token of a vocabulary, made when it is first asked for; for any thread.

    Args:
        tokenizer: vLLM's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, ids: npt.NDArray[np.int32]) -> list[str]:
        """Return the text of tokens; that of an id beyond the vocabulary is empty."""
        numbers = ids.tolist()
        self._learn({number for number in numbers if number not in self._known})
        return [self._known.get(number, "") for number in numbers]

    def added_to(self, trace: RouteTrace) -> RouteTrace:
        """Return a trace with the text of its tokens, if it has their ids."""
        if trace.token_ids is None:
            return trace
        return dataclasses.replace(trace, tokens=self.of(trace.token_ids))

    def json_bytes(self, trace: RouteTrace) -> int:
        """Return what the text of a trace's tokens takes in JSON, in bytes."""
        if trace.token_ids is None:
            return 0
        ids, counts = np.unique(trace.token_ids, return_counts=True)
        lengths = [len(orjson.dumps(text)) + len(",") for text in self.of(ids)]
        return int(counts @ np.array(lengths, np.int64))

    def _learn(self, numbers: Collection[int]) -> None:
        last = self._tokenizer.max_token_id
        valid = [number for number in numbers if 0 <= number <= last]
        pieces = self._tokenizer.convert_ids_to_tokens(valid) if valid else []
        for number, piece in zip(valid, pieces, strict=True):
            self._known[number] = self._text(number, piece)

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        """Tokens that stand for themselves: special ones, and others that were added."""
        return frozenset([*self._tokenizer.get_added_vocab(), *self._tokenizer.all_special_tokens])

    def _text(self, number: int, piece: str | bytes | None) -> str:
        """Return the text of a token, given what the vocabulary has for it."""
        if isinstance(piece, bytes):
            return shown(piece)
        if piece is None or piece in self._names:
            return piece or ""
        text = self._decoded(piece)
        raw = self._raw(number, piece) if _REPLACED in text else None
        return shown(text.encode("utf-8", "surrogatepass") if raw is None else raw)

    def _decoded(self, piece: str) -> str:
        decode = self._tokenizer.convert_tokens_to_string
        before, both = decode([_BEFORE]), decode([_BEFORE, piece])
        return str(both.removeprefix(before) if both.startswith(before) else decode([piece]))

    def _raw(self, number: int, piece: str) -> bytes | None:
        """Return the bytes that a token stands for; None where there is no way to tell.

        Those of a byte that a vocabulary falls back to are its name, such as ``<0xF0>``.
        """
        if all(char in _BYTE_OF for char in piece):
            return bytes(_BYTE_OF[char] for char in piece)
        # Mistral's gives bytes where they are no UTF-8, but only so.
        found = self._tokenizer.convert_ids_to_tokens([number], skip_special_tokens=True)
        return found[0] if found and isinstance(found[0], bytes) else None


def shown(data: bytes) -> str:
    """Return bytes as UTF-8; those that are none as ``<0xF0>``."""
    return _NO_UTF8.sub(
        lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", data.decode("utf-8", "surrogateescape")
    )


def _byte_chars() -> dict[str, int]:
    """Return which byte a character of a byte-level vocabulary stands for.

    Source: GPT-2's ``encoder.py``, ``bytes_to_unicode``, as in ``tokenizers``' ``ByteLevel``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


_BYTE_OF = _byte_chars()
