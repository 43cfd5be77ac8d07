"""The texts of token ids, from a ``tokenizer.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from moescope.errors import FormatError
from moescope.received import MALFORMED, shown


def read(path: Path) -> dict[int, str]:
    """Return the text of each token id.

    Args:
        path: A ``tokenizer.json`` of Hugging Face tokenizers, or the directory of a checkpoint
            that has one.

    Raises:
        FormatError: It cannot be read, or is something else.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        values = orjson.loads(file.read_bytes())
        texts = {number: text for text, number in _vocabulary(values["model"]["vocab"]).items()}
        if _is_byte_level(values.get("decoder")):
            texts = {number: _decoded(text) for number, text in texts.items()}
        added = {int(one["id"]): str(one["content"]) for one in values.get("added_tokens", ())}
    except OSError as error:
        raise FormatError(f"cannot read {file}: {error.strerror}") from error
    except MALFORMED as error:
        raise FormatError(f"{file} is no tokenizer.json: {shown(error)}") from error
    return texts | added


def _vocabulary(values: Any) -> dict[str, int]:  # noqa: ANN401
    """Return the ids by token: BPE and WordPiece have a mapping, Unigram pairs in order."""
    if isinstance(values, dict):
        return {str(text): int(number) for text, number in values.items()}
    return {str(text): number for number, (text, _) in enumerate(values)}


def _is_byte_level(decoder: Any) -> bool:  # noqa: ANN401
    parts = [decoder, *(decoder or {}).get("decoders", ())]
    return any((one or {}).get("type") == "ByteLevel" for one in parts)


def _alphabet() -> dict[str, int]:
    """Return the byte of each character that byte-level BPE writes one as.

    Bytes that are printable in Latin-1 are written as themselves, the others, in their order, as
    the characters from 256 on.

    Source: Radford et al. 2019, GPT-2's ``encoder.py``.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTES = _alphabet()


def _decoded(text: str) -> str:
    if not all(one in _BYTES for one in text):
        return text
    return bytes(_BYTES[one] for one in text).decode("utf-8", "replace")
