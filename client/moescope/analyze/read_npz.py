"""Reads an ``.npz`` of traces some rows at a time, however large it is."""

from __future__ import annotations

import contextlib
import itertools
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moescope.analysis import NO_TOKEN, Rows
from moescope.analyze.batches import Batch, Key, Model, Sequences, Text, check_ids
from moescope.received import parse_json
from moescope.trace import Source

_npy: Any = np.lib.format  # numpy gives its functions no types


def read(path: Path, label: str) -> Iterator[Batch]:
    """Read the traces of an ``.npz``; nothing is unpickled.

    Args:
        path: The file.
        label: The label of the input.

    Raises:
        CommandError: It holds several models.
        Exception: The bytes are no ``.npz`` of traces; what it is depends on where they are broken.
    """
    with zipfile.ZipFile(path) as archive:
        meta = _array(archive, "meta").tobytes()
        sequences = Sequences(metas := parse_json(meta), label)
        splits = _array(archive, "row_splits")
        source = _array(archive, "source")
        tokens = _tokens(archive, metas, splits)
        with contextlib.ExitStack() as stack:
            ids = _Member(stack.enter_context(archive.open("topk_ids.npy")))
            weights = None
            if "topk_weights.npy" in archive.namelist():
                weights = _Member(stack.enter_context(archive.open("topk_weights.npy")))
            model = Model(
                layers=tuple(_array(archive, "layers").tolist()),
                num_experts=sequences.num_experts,
                top_k=ids.shape[2],
                name=sequences.name,
            )
            _check(ids, weights, splits, source, model)
            for start in range(0, ids.shape[0], model.batch_rows):
                end = min(start + model.batch_rows, ids.shape[0])
                present = source[start:end] != Source.MISSING
                place = np.arange(start, end)[present]
                sequence = np.searchsorted(splits, place, side="right") - 1
                some = ids.rows(end - start)[present]
                check_ids(some, model.num_experts)
                yield Batch(
                    model=model,
                    rows=Rows(
                        num_experts=model.num_experts,
                        topk_ids=some,
                        topk_weights=weights.rows(end - start)[present] if weights else None,
                        token_ids=tokens[start:end][present],
                        **sequences.columns(sequence, place - splits[sequence]),
                    ),
                    keys=sequences.keys,
                    places=sequence,
                    num_missing=int((~present).sum()),
                    done=end / ids.shape[0],
                )


def texts(path: Path) -> Iterator[tuple[Key, Text]]:
    """Read the tokens of the sequences, or pages of sequences, of an ``.npz``.

    Args:
        path: The file.

    Raises:
        Exception: As `read` does.
    """
    with zipfile.ZipFile(path) as archive:
        metas = parse_json(_array(archive, "meta").tobytes())
        tokens, splits = _array(archive, "token_ids"), _array(archive, "token_splits")
    for meta, (first, last) in zip(metas, itertools.pairwise(splits.tolist()), strict=True):
        yield (
            (str(meta["request_id"]), int(meta["index"])),
            Text(
                prompt_len=int(meta["prompt_len"]),
                token_ids=tokens[first:last] if meta["has_token_ids"] else None,
                start=int(meta["start"]),
            ),
        )


class _Member:
    """An array whose rows are read one after the other.

    Args:
        file: An ``.npy``.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        version = _npy.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"an array has version {version} of .npy: expected (1, 0)")
        self.shape, is_fortran, self._dtype = _npy.read_array_header_1_0(file)
        if is_fortran or self._dtype.kind not in "uif" or len(self.shape) != 3:
            raise ValueError(f"an array is {self._dtype} of shape {self.shape}")

    def rows(self, num_rows: int) -> npt.NDArray[Any]:
        """Return the next rows."""
        size = num_rows * math.prod(self.shape[1:]) * self._dtype.itemsize
        data = self._file.read(size)
        if len(data) != size:
            raise ValueError(f"an array of shape {self.shape} ends early")
        return np.frombuffer(data, self._dtype).reshape(num_rows, *self.shape[1:])


def _array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as file:
        array: npt.NDArray[Any] = _npy.read_array(file, allow_pickle=False)
    return array


def _tokens(
    archive: zipfile.ZipFile, metas: list[dict[str, Any]], row_splits: npt.NDArray[Any]
) -> npt.NDArray[np.int32]:
    """Return the token id of each row; the last token of a sequence has none."""
    tokens, splits = _array(archive, "token_ids"), _array(archive, "token_splits")
    found = np.full(int(row_splits[-1]), NO_TOKEN, np.int32)
    spans = zip(metas, itertools.pairwise(row_splits.tolist()), splits.tolist(), strict=False)
    for meta, (start, end), first in spans:
        if meta["has_token_ids"]:
            found[start:end] = tokens[first : first + end - start]
    return found


def _check(
    ids: _Member,
    weights: _Member | None,
    splits: npt.NDArray[Any],
    source: npt.NDArray[Any],
    model: Model,
) -> None:
    num_rows, num_layers, _ = ids.shape
    if weights and weights.shape != ids.shape:
        raise ValueError(f"topk_weights has shape {weights.shape}, topk_ids {ids.shape}")
    if len(source) != num_rows or num_layers != len(model.layers) or splits[-1] != num_rows:
        raise ValueError(f"topk_ids has shape {ids.shape}, and the other arrays another")
    if (np.diff(splits) < 0).any() or splits[0] != 0:
        raise ValueError("row_splits does not rise from 0")
