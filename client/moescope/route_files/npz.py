"""Reads and writes an ``.npz`` of traces one trace at a time, however large it is."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope import formats, version_runs
from moescope.npz_file import NpzFile
from moescope.route_files.spool import Kept, Server, Stored

_npy: Any = np.lib.format  # numpy gives its functions no types
_SPLITS = {
    "row_splits": "source",
    "version_splits": "weights_versions",
    "token_splits": "token_ids",
}


def write(path: Path, stored: Stored) -> None:
    """Write what `moescope.formats.dump_npz` does, with one more member, ``server``, as JSON."""
    metas = [{n: v for n, v in meta.items() if n != "num_rows"} for meta in stored.metas]
    small: dict[str, npt.NDArray[Any]] = {
        "meta": _json(metas),
        "server": _json(stored.server),
        "layers": stored.layers,
        **{splits: stored.splits(of) for splits, of in _SPLITS.items()},
    }
    shape = (stored.num_rows, len(stored.layers), stored.top_k)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in small.items():
            _write(archive, name, array.dtype, array.shape, [array])
        for name, dtype, of in (
            ("topk_ids", np.uint8, shape),
            ("topk_weights", None, shape),
            ("source", np.uint8, shape[:1]),
            ("weights_versions", np.int64, (sum(stored.lengths("weights_versions")), 2)),
            ("token_ids", np.int32, (sum(stored.lengths("token_ids")),)),
        ):
            held = stored.dtype(name) or dtype
            if held is not None:
                parts = (one for one in stored.arrays(name) if one is not None)
                _write(archive, name, np.dtype(held), of, parts)
        if stored.dtype("tokens"):
            size = sum(map(len, _texts(stored)))
            texts = (np.frombuffer(one, np.uint8) for one in _texts(stored))
            _write(archive, "tokens", np.dtype(np.uint8), (size,), texts)


def _texts(stored: Stored) -> Iterator[bytes]:
    """Yield the JSON of the tokens' text, piece by piece."""
    before = b"["
    for text in stored.arrays("tokens"):
        yield before + (b"null" if text is None else text.tobytes())
        before = b","
    yield b"]"


def _json(values: object) -> npt.NDArray[np.uint8]:
    return np.frombuffer(orjson.dumps(values), np.uint8)


def _write(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    parts: Iterable[npt.NDArray[Any]],
) -> None:
    """Write a member whose parts come one after the other."""
    header = {"descr": _npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        _npy.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).tobytes())


def read(path: Path) -> tuple[Server, Iterator[Kept]]:
    """Return what an ``.npz`` says of its server, and its traces, every value checked.

    Raises:
        Exception: It is no ``.npz`` of traces; what it is depends on where it is broken.
    """
    with NpzFile(path) as file:
        return (file.json("server") if "server" in file else {}), _traces(path)


def _traces(path: Path) -> Iterator[Kept]:
    with NpzFile(path) as file, contextlib.ExitStack() as stack:
        metas = file.json("meta")
        texts = file.json("tokens") if "tokens" in file else [None] * len(metas)
        ids = stack.enter_context(file.rows("topk_ids"))
        weights = stack.enter_context(file.rows("topk_weights")) if "topk_weights" in file else None
        names = ("layers", *_SPLITS, *_SPLITS.values())
        held = _no_runs(len(metas)) | {one: file.array(one) for one in names if one in file}
        spans = [formats.spans(held, splits, of) for splits, of in _SPLITS.items()]
        if ids.shape[:1] != held["source"].shape or (weights and weights.shape != ids.shape):
            raise ValueError(f"topk_ids has shape {ids.shape}, and the other arrays another")
        parts = zip(metas, texts, *spans, strict=True)
        for number, (meta, text, of_rows, of_runs, of_tokens) in enumerate(parts, start=1):
            num_rows = of_rows.stop - of_rows.start
            arrays = {
                "layers": held["layers"],
                "topk_ids": ids.take(num_rows),
                "source": held["source"][of_rows],
                "weights_versions": held["weights_versions"][of_runs],
                "token_ids": held["token_ids"][of_tokens],
                **({"topk_weights": weights.take(num_rows)} if weights else {}),
            }
            yield _kept(meta, text, arrays, number / len(metas))


def _no_runs(num_traces: int) -> dict[str, npt.NDArray[Any]]:
    """Return the members that files of before there were versions lack."""
    return {
        "weights_versions": version_runs.unknown(),
        "version_splits": np.zeros(num_traces + 1, np.int64),
    }


def _kept(
    meta: dict[str, Any], text: list[str] | None, arrays: dict[str, npt.NDArray[Any]], done: float
) -> Kept:
    """Return a trace whose arrays are its own."""
    knows_prompt = meta["prompt_len"] is not None
    of_one = {
        "meta": _json([{**meta, "prompt_len": meta["prompt_len"] or 0}]),
        "row_splits": np.array([0, len(arrays["topk_ids"])]),
        "version_splits": np.array([0, len(arrays["weights_versions"])]),
        "token_splits": np.array([0, len(arrays["token_ids"])]),
        **({} if text is None else {"tokens": _json([text])}),
    }
    (trace,) = formats.traces_of({**arrays, **of_one})
    return Kept(trace, knows_prompt, done)
