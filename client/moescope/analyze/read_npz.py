"""Reads an ``.npz`` of traces some rows at a time, however large it is."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope.analysis import NO_TOKEN, Rows
from moescope.analyze.batches import Batch, Key, Model, Sequences, Text, check_ids
from moescope.npz_file import ArrayRows, NpzFile
from moescope.trace import Source

_MAX_TEXT_BYTES = 64 * 2**20
"""Bytes of tokens' text that are read, as JSON, which becomes some times as much."""


def read(path: Path, label: str) -> Iterator[Batch]:
    """Read the traces of an ``.npz``; nothing is unpickled.

    Args:
        path: The file.
        label: The label of the input.

    Raises:
        CommandError: It holds several models.
        Exception: The bytes are no ``.npz`` of traces; what it is depends on where they are broken.
    """
    with NpzFile(path) as file, contextlib.ExitStack() as stack:
        metas = file.json("meta")
        sequences = Sequences(metas, label)
        splits, source = file.array("row_splits"), file.array("source")
        tokens, token_texts = _tokens(file, metas, splits), _token_texts(file)
        ids = stack.enter_context(file.rows("topk_ids"))
        weights = None
        if "topk_weights" in file:
            weights = stack.enter_context(file.rows("topk_weights"))
        model = Model(
            layers=tuple(file.array("layers").tolist()),
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
            some = ids.take(end - start)[present]
            check_ids(some, model.num_experts)
            yield Batch(
                model=model,
                rows=Rows(
                    num_experts=model.num_experts,
                    topk_ids=some,
                    topk_weights=weights.take(end - start)[present] if weights else None,
                    token_ids=tokens[start:end][present],
                    **sequences.columns(sequence, place - splits[sequence]),
                ),
                num_missing=int((~present).sum()),
                done=end / ids.shape[0],
                keys=sequences.keys,
                places=sequence,
                token_texts=token_texts,
            )
            token_texts = {}


def texts(path: Path) -> Iterator[tuple[Key, Text]]:
    """Read the tokens of the sequences, or pages of them, of those whose prompt is known.

    Args:
        path: The file.

    Raises:
        Exception: As `read` does.
    """
    with NpzFile(path) as file:
        metas = file.json("meta")
        tokens, splits = file.array("token_ids"), file.array("token_splits")
    for meta, (first, last) in zip(metas, itertools.pairwise(splits.tolist()), strict=True):
        if meta["prompt_len"] is not None:
            yield (
                (str(meta["request_id"]), int(meta["index"])),
                Text(
                    prompt_len=int(meta["prompt_len"]),
                    token_ids=tokens[first:last] if meta["has_token_ids"] else None,
                    start=int(meta["start"]),
                ),
            )


def _tokens(
    file: NpzFile, metas: list[dict[str, Any]], row_splits: npt.NDArray[Any]
) -> npt.NDArray[np.int32]:
    """Return the token id of each row; the last token of a sequence has none."""
    tokens, splits = file.array("token_ids"), file.array("token_splits")
    found = np.full(int(row_splits[-1]), NO_TOKEN, np.int32)
    spans = zip(metas, itertools.pairwise(row_splits.tolist()), splits.tolist(), strict=False)
    for meta, (start, end), first in spans:
        if meta["has_token_ids"]:
            found[start:end] = tokens[first : first + end - start]
    return found


def _token_texts(file: NpzFile) -> dict[int, str]:
    """Return the text of each token id, where the traces have it."""
    if "tokens" not in file or file.size_bytes("tokens") > _MAX_TEXT_BYTES:
        return {}
    ids, splits = file.array("token_ids").tolist(), file.array("token_splits").tolist()
    texts: dict[int, str] = {}
    for first, text in zip(splits, file.json("tokens"), strict=False):
        if text is not None:
            texts.update(
                (token, str(one)) for token, one in zip(ids[first:], text, strict=False) if one
            )
    return texts


def _check(
    ids: ArrayRows,
    weights: ArrayRows | None,
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
