"""Traces as ``.npz``: all of them in ragged arrays; see `moescope.formats`."""

from __future__ import annotations

import io
import itertools
import math
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope import version_runs
from moescope.errors import FormatError
from moescope.formats.shared import check_alike, marks, meta_of
from moescope.received import MALFORMED, MAX_BYTES, check_fields, parse_json, shown
from moescope.trace import RouteTrace

_npy: Any = np.lib.format  # numpy gives its functions no types
_MAX_MEMBERS = 64
_MAX_DIRECTORY_BYTES = 64 * 2**10
_END = struct.Struct("<4sHHHHIIH")  # of a zip file: APPNOTE.TXT of PKWARE, 4.3.16
_IS_ENCRYPTED = 1
_NO_RUNS = version_runs.unknown()


def dump_npz(
    traces: Sequence[RouteTrace],
    *,
    truncated: bool = False,
    next_start: int | None = None,
    **members: npt.NDArray[Any],
) -> bytes:
    """Write traces of one model as the bytes of an ``.npz`` (uncompressed).

    Args:
        traces: Any number of them; without any there are no layers either.
        truncated: Whether older requests of the same id are left out.
        next_start: The first row that is left out; None where none is.
        members: What else the archive holds.

    Raises:
        FormatError: Traces whose layers, top-k or weights differ.
    """
    marked = marks(truncated=truncated, next_start=next_start)
    more = {name: np.array(value) for name, value in marked.items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays_of(traces), **more, **members)
    return buffer.getvalue()


def arrays_of(traces: Sequence[RouteTrace]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an ``.npz``; `traces_of` reads them.

    Raises:
        FormatError: Traces whose layers, top-k or weights differ.
    """
    check_alike(traces)
    tokens = [np.empty(0, np.int32) if t.token_ids is None else t.token_ids for t in traces]
    arrays: dict[str, npt.NDArray[Any]] = {
        "meta": np.frombuffer(orjson.dumps(meta_of(traces)), np.uint8),
        "layers": traces[0].layers if traces else np.empty(0, np.int32),
        "topk_ids": _joined([t.topk_ids for t in traces], np.empty((0, 0, 0), np.uint8)),
        "source": _joined([t.source for t in traces], np.empty(0, np.uint8)),
        "row_splits": np.cumsum([0, *(t.num_rows for t in traces)]),
        "weights_versions": _joined([t.weights_versions for t in traces], _NO_RUNS),
        "version_splits": np.cumsum([0, *(len(t.weights_versions) for t in traces)]),
        "token_ids": _joined(tokens, np.empty(0, np.int32)),
        "token_splits": np.cumsum([0, *map(len, tokens)]),
    }
    weights = [t.topk_weights for t in traces if t.topk_weights is not None]
    if weights:
        arrays["topk_weights"] = np.concatenate(weights)
    if any(t.tokens is not None for t in traces):
        arrays["tokens"] = np.frombuffer(orjson.dumps([t.tokens for t in traces]), np.uint8)
    return arrays


def _joined(arrays: list[npt.NDArray[Any]], nothing: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else nothing


def load_npz(data: bytes, max_bytes: int = MAX_BYTES) -> list[RouteTrace]:
    """Read the traces that `dump_npz` wrote; nothing is unpickled.

    Args:
        data: The file.
        max_bytes: Bytes that its arrays may have.

    Raises:
        FormatError: The bytes are not an ``.npz`` of traces, or more than that.
    """
    return traces_of(read_npz(data, max_bytes), max_bytes)


def traces_of(arrays: dict[str, npt.NDArray[Any]], max_bytes: int = MAX_BYTES) -> list[RouteTrace]:
    """Return the traces in the arrays of an ``.npz``, every value checked.

    Args:
        arrays: By name.
        max_bytes: The bound of `parse_json` for what is JSON in them.

    Raises:
        FormatError: An array is missing, or does not fit the others.
    """
    traces = []
    try:
        metas = parse_json(arrays["meta"].tobytes(), max_bytes)
        row_spans = spans(arrays, "row_splits", "topk_ids")
        token_spans = spans(arrays, "token_splits", "token_ids")
        runs = arrays.get("weights_versions", _NO_RUNS)
        # Files of before there were versions have none.
        run_spans = (
            spans(arrays, "version_splits", "weights_versions")
            if "weights_versions" in arrays
            else [slice(0)] * len(row_spans)
        )
        texts = (
            parse_json(arrays["tokens"].tobytes(), max_bytes)
            if "tokens" in arrays
            else [None] * len(row_spans)
        )
        parts = zip(metas, row_spans, run_spans, token_spans, texts, strict=True)
        for meta, rows, versions, tokens, text in parts:
            has_tokens = meta.pop("has_token_ids")
            check_fields(RouteTrace, meta)
            trace = RouteTrace(
                **meta,
                layers=arrays["layers"],
                topk_ids=arrays["topk_ids"][rows],
                topk_weights=arrays["topk_weights"][rows] if "topk_weights" in arrays else None,
                source=arrays["source"][rows],
                weights_versions=runs[versions],
                token_ids=arrays["token_ids"][tokens] if has_tokens else None,
                tokens=text,
            )
            traces.append(trace.check_values())
    except MALFORMED as error:
        raise FormatError(f"not an .npz of traces: {shown(error)}") from error
    return traces


def spans(arrays: dict[str, npt.NDArray[Any]], splits: str, of: str) -> list[slice]:
    """Return where each trace's part of an array is.

    Args:
        arrays: By name.
        splits: The name of those that say it.
        of: The name of the array.

    Raises:
        LookupError: One is missing.
        ValueError: They do not rise from 0 to the array's end.
    """
    numbers = arrays[splits]
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"{splits} must be integers [num_traces + 1], got {numbers.dtype} of "
            f"shape {numbers.shape}"
        )
    bounds = numbers.tolist()
    if bounds[:1] != [0] or bounds[-1] != len(arrays[of]) or sorted(bounds) != bounds:
        raise ValueError(f"{splits} must rise from 0 to {len(arrays[of])}, got {shown(bounds, 80)}")
    return list(itertools.starmap(slice, itertools.pairwise(bounds)))


def read_npz(data: bytes, max_bytes: int = MAX_BYTES) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an ``.npz``; nothing is unpickled.

    Args:
        data: The file.
        max_bytes: Bytes that its arrays may have.

    Raises:
        FormatError: The bytes are not an ``.npz``, or more than that.
    """
    try:
        _check_directory(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            _check_members(members, max_bytes)
            return {
                one.filename.removesuffix(".npy"): _array_or_again(archive, one) for one in members
            }
    except Exception as error:
        # Damaged bytes make zipfile, zlib and numpy raise whatever they meet first.
        raise FormatError(f"not an .npz: {shown(error)}") from error


def _check_directory(data: bytes) -> None:
    """Check the size of the directory: zipfile makes an object of each of its entries at once.

    As numpy writes it, a file ends with the end of its directory, without a comment, and is no
    zip64, whose end would say another size.
    """
    signature, *_, size, _, comment_size = _END.unpack(data[-_END.size :])
    if signature != b"PK\x05\x06" or comment_size or data[-42:-38] == b"PK\x06\x07":
        raise ValueError("it does not end as numpy ends one")
    if size > _MAX_DIRECTORY_BYTES:
        raise ValueError(f"its directory has {size:,} bytes: more than {_MAX_DIRECTORY_BYTES:,}")


def _check_members(members: list[zipfile.ZipInfo], max_bytes: int) -> None:
    if len(members) > _MAX_MEMBERS:
        raise ValueError(f"it has {len(members)} members: more than {_MAX_MEMBERS}")
    size = sum(member.file_size for member in members)
    if size > max_bytes:
        raise ValueError(f"its arrays have {size:,} bytes: more than max_bytes={max_bytes:,}")
    for member in members:
        is_plain = member.compress_type in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
        if not is_plain or member.flag_bits & _IS_ENCRYPTED:
            raise ValueError(f"{member.filename!r} is neither stored nor deflated")
        if not member.filename.endswith(".npy"):
            raise ValueError(f"{member.filename!r} is no .npy")
    if len({member.filename for member in members}) != len(members):
        raise ValueError("two members have the same name")


def _array_or_again(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """Read an array, twice if Python failed.

    numpy parses headers with ``ast``, which raises SystemError in Python 3.11 if a traceback is
    formatted meanwhile, in another thread or a finalizer (CPython issue 106905).
    """
    try:
        return _array(archive, member)
    except SystemError:
        return _array(archive, member)


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """Read an array whose header says what the size of its member says."""
    with archive.open(member) as file:
        version = _npy.read_magic(file)
        if version != (1, 0):  # others may say that the header itself has gigabytes
            raise ValueError(f"{member.filename!r} has version {version} of .npy: expected (1, 0)")
        shape, _, dtype = _npy.read_array_header_1_0(file)
        size = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.kind not in "biuf" or len(shape) > 3 or min(shape, default=0) < 0:
        raise ValueError(f"{member.filename!r} is {shown(dtype, 80)} of shape {shape}")
    if size != member.file_size:
        raise ValueError(
            f"{member.filename!r} has {member.file_size:,} bytes, and shape {shape} of {dtype} "
            f"takes {size:,}"
        )
    with archive.open(member) as file:
        array: npt.NDArray[Any] = _npy.read_array(file, allow_pickle=False)
    return array
