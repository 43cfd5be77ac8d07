"""The ids of clients: of any length and in two encodings, kept and looked up in one way."""

from __future__ import annotations

import hashlib

MAX_ID_CHARS = 512
"""Longer ids are shortened wherever they are kept or looked up."""
_HEAD_CHARS = 448


def short_id(text: str) -> str:
    """Return an id as it is kept and looked up.

    Ids of at most `MAX_ID_CHARS` characters stay as they are. Of a longer one the first 448
    characters are kept, then ``...`` and 32 hexadecimal digits: BLAKE2b of all of it in UTF-8, 16
    bytes. A shortened id is returned as it is.

    Args:
        text: An id of a request, or the engine's id of a sequence, which has it in front.
    """
    if len(text) <= MAX_ID_CHARS:
        return text
    return f"{text[:_HEAD_CHARS]}...{_digest(text, 16).hex()}"


def readings(text: str) -> list[str]:
    """Return what a header that servers read as Latin-1 may say: that, and UTF-8 if it is such.

    HTTP says nothing of other characters than ASCII. vLLM reads Latin-1: a response to ``zürich-7``
    in UTF-8 has the id ``cmpl-zÃ¼rich-7``. Its client knows the one and sees the other.
    """
    try:
        return list(dict.fromkeys((text, text.encode("latin-1").decode())))
    except UnicodeError:
        return [text]


def meant_ids(end_of_path: str) -> list[str]:
    """Return the ids that the end of a URL's path may mean, the likelier one first.

    An id may have slashes, and one that ends in a slash comes before the same one without it.
    """
    return list(dict.fromkeys((end_of_path, end_of_path.removesuffix("/"))))


def id_hash(text: str) -> int:
    """Return 64 bits by which an id is remembered; the same in every process."""
    return int.from_bytes(_digest(text, 8))


def _digest(text: str, size_bytes: int) -> bytes:
    encoded = text.encode(errors="surrogatepass")
    return hashlib.blake2b(encoded, digest_size=size_bytes).digest()
