"""Reads a Parquet file of traces, or of an archive, some rows at a time; needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope.analysis import NO_TOKEN, PHASES, Rows, request_number
from moescope.analyze.batches import Batch, Key, Model, Sequences, Text, check_ids
from moescope.errors import CommandError
from moescope.received import parse_json

_COLUMNS = ("request_id", "index", "position", "is_prompt", "token_id", "source", "topk_ids")


def read(path: Path, label: str) -> Iterator[Batch]:
    """Read a file of `moescope.arrow.dump_parquet`.

    Args:
        path: The file.
        label: The label of the input.

    Raises:
        CommandError: pyarrow is not installed, or the file holds several models.
        Exception: It is no such file; what it is depends on where it is broken.
    """
    with _open(path) as file:
        shared = parse_json((file.schema_arrow.metadata or {})[b"moescope"])
        model = _model(shared, label)
        columns = [*_COLUMNS, *(["topk_weights"] if shared["weights_dtype"] else [])]
        num_done = 0
        for table in file.iter_batches(model.batch_rows, columns=columns):
            num_done += len(table)
            yield _batch(table, model, label, num_done / file.metadata.num_rows)


def texts(path: Path) -> Iterator[tuple[Key, Text]]:
    """Read the tokens of the sequences of a file.

    Args:
        path: The file.

    Raises:
        CommandError: pyarrow is not installed.
        Exception: As `read` does.
    """
    with _open(path) as file:
        shared = parse_json((file.schema_arrow.metadata or {})[b"moescope"])
        if "archive" in shared:
            yield from _archived_texts(file)
            return
        tokens = file.read(columns=["token_id"])["token_id"].fill_null(NO_TOKEN).to_numpy()
    first = 0
    for meta in shared["traces"]:
        is_last = meta["start"] + meta["num_rows"] >= meta["num_tokens"] - 1
        last = first + meta["num_rows"] + is_last
        yield (
            (str(meta["request_id"]), int(meta["index"])),
            Text(
                prompt_len=int(meta["prompt_len"]),
                token_ids=tokens[first:last] if meta["has_token_ids"] else None,
                start=int(meta["start"]),
            ),
        )
        first = last
    if first != len(tokens):
        raise ValueError(f"it has {len(tokens):,} tokens, and its traces {first:,}")


def _model(shared: dict[str, Any], label: str) -> Model:
    """Return what a file is of, by its metadata; a file of an archive has one model."""
    of = Sequences([] if "archive" in shared else shared["traces"], label)
    return Model(
        layers=tuple(shared["layers"]),
        num_experts=int(shared["num_experts"]) if "archive" in shared else of.num_experts,
        top_k=shared["top_k"],
        name=str(shared["spec"]["model"]) if "archive" in shared else of.name,
    )


def _archived_texts(file: Any) -> Iterator[tuple[Key, Text]]:  # noqa: ANN401
    """Read the tokens of the sequences of a file of an archive."""
    table = file.read(columns=["number", "request_id", "index", "prompt_len", "token_id"])
    bounds = np.flatnonzero(np.diff(table["number"].to_numpy(), prepend=-1))
    heads = table.select(["request_id", "index", "prompt_len"]).take(bounds).to_pylist()
    tokens = table["token_id"]
    for head, first, last in zip(heads, bounds, [*bounds[1:], len(table)], strict=True):
        own = tokens.slice(first, last - first)
        text = Text(
            prompt_len=head["prompt_len"],
            token_ids=None if own.null_count else own.to_numpy(),
        )
        yield (head["request_id"], head["index"]), text


def _open(path: Path) -> Any:  # noqa: ANN401
    try:
        from pyarrow import parquet  # noqa: PLC0415 - the light base has no pyarrow
    except ImportError as error:
        raise CommandError(
            "reading Parquet needs pyarrow, moescope's extra `arrow`: pip install pyarrow"
        ) from error
    return parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)


def _batch(table: Any, model: Model, label: str, done: float) -> Batch:  # noqa: ANN401
    import pyarrow.compute as pc  # noqa: PLC0415

    present = table["topk_ids"].is_valid()
    num_missing = int(pc.sum(pc.equal(_text(table["source"]), "missing")).as_py() or 0)
    table = table.filter(present)
    names = _text(table["request_id"]).dictionary_encode()
    ids, number = names.dictionary.to_pylist(), names.indices.to_numpy(zero_copy_only=False)
    choice = table["index"].to_numpy(zero_copy_only=False)
    pairs, places = np.unique(np.stack((number, choice)), axis=1, return_inverse=True)
    numbers = [request_number(one, label) for one in ids]
    topk_ids = _flat(table["topk_ids"], model)
    check_ids(topk_ids, model.num_experts)
    has_weights = "topk_weights" in table.schema.names
    is_prompt = table["is_prompt"].to_numpy(zero_copy_only=False)
    return Batch(
        model=model,
        rows=Rows(
            num_experts=model.num_experts,
            topk_ids=topk_ids,
            topk_weights=_flat(table["topk_weights"], model) if has_weights else None,
            token_ids=table["token_id"].fill_null(NO_TOKEN).to_numpy(zero_copy_only=False),
            positions=table["position"].to_numpy(zero_copy_only=False),
            phases=np.where(is_prompt, PHASES.index("prompt"), PHASES.index("output")).astype(
                np.uint8
            ),
            requests=np.array(numbers, np.uint64)[number],
        ),
        keys=[(ids[one], index) for one, index in pairs.T.tolist()],
        places=places.reshape(-1),
        num_missing=num_missing,
        done=done,
    )


def _text(column: Any) -> Any:  # noqa: ANN401
    import pyarrow as pa  # noqa: PLC0415

    return column.cast(pa.string())


def _flat(column: Any, model: Model) -> npt.NDArray[Any]:  # noqa: ANN401
    """Return a column of lists, none of them null, as ``[num_rows, num_layers, top_k]``."""
    flat = column.flatten().flatten().to_numpy(zero_copy_only=False)
    array: npt.NDArray[Any] = flat.reshape(len(column), len(model.layers), model.top_k)
    return array
