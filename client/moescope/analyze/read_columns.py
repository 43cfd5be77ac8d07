"""Reads a Parquet or Arrow file of traces, or one of an archive, some rows at a time.

Needs the extra ``arrow``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope.analysis import NO_TOKEN, PHASES, Rows, request_number
from moescope.analyze.batches import Batch, Key, Model, Sequences, Text, check_ids
from moescope.columns_file import ColumnsFile, columns_file
from moescope.filters import EVERY, Filter

_COLUMNS = ("request_id", "index", "position", "is_prompt", "token_id", "source", "topk_ids")


def read(path: Path, label: str, where: Filter = EVERY) -> Iterator[Batch]:
    """Read a table of `moescope.arrow.to_table`: ``.parquet``, ``.arrow``, or an Arrow stream.

    Args:
        path: The file.
        label: The label of the input.
        where: Which traces, of a file of an archive.

    Raises:
        CommandError: pyarrow is not installed, the file holds several models, or is none of an
            archive and not all traces are wanted.
        FormatError: It is of the long form.
        Exception: It is no such file; what it is depends on where it is broken.
    """
    with columns_file(path) as file:
        model, num_tokens = _model(file.shared, label)
        columns = [*_COLUMNS, *({"topk_weights", "token"} & set(file.names))]
        num_rows = file.num_rows or num_tokens
        num_done = 0
        for table in file.batches(model.batch_rows, columns, where):
            num_done += len(table)
            yield _batch(table, model, label, min(1.0, num_done / num_rows))


def texts(path: Path, where: Filter = EVERY) -> Iterator[tuple[Key, Text]]:
    """Read the tokens of the sequences of a file, of those whose prompt is known.

    Args:
        path: The file.
        where: As of `read`.

    Raises:
        CommandError: pyarrow is not installed.
        Exception: As `read` does.
    """
    with columns_file(path) as file:
        from moescope.arrow import table_rows  # noqa: PLC0415 - the light base has no pyarrow

        if "archive" in file.shared:
            yield from _archived_texts(file, where)
            return
        metas = file.shared["traces"]
        columns = [one["token_id"] for one in file.batches(2**20, ["token_id"], where)]
    parts = [one.fill_null(NO_TOKEN).to_numpy(zero_copy_only=False) for one in columns]
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
    first = 0
    for meta in metas:
        last = first + table_rows(meta)
        if meta["prompt_len"] is not None:
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


def _model(shared: dict[str, Any], label: str) -> tuple[Model, int]:
    """Return what a file is of, and its tokens; a file of an archive does not say how many."""
    is_archived = "archive" in shared
    of = Sequences([] if is_archived else shared["traces"], label)
    model = Model(
        layers=tuple(shared["layers"]),
        num_experts=int(shared["num_experts"]) if is_archived else of.num_experts,
        top_k=shared["top_k"],
        name=str(shared["spec"]["model"]) if is_archived else of.name,
    )
    return model, of.num_tokens


def _archived_texts(file: ColumnsFile, where: Filter) -> Iterator[tuple[Key, Text]]:
    """Read the tokens of the sequences of a file of an archive."""
    import pyarrow as pa  # noqa: PLC0415

    columns = ["number", "request_id", "index", "prompt_len", "token_id"]
    batches = [*file.batches(2**20, columns, where)]
    if not batches:
        return
    table = pa.Table.from_batches(batches)
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
    tokens = table["token_id"].fill_null(NO_TOKEN).to_numpy(zero_copy_only=False)
    return Batch(
        model=model,
        rows=Rows(
            num_experts=model.num_experts,
            topk_ids=topk_ids,
            topk_weights=_flat(table["topk_weights"], model) if has_weights else None,
            token_ids=tokens,
            positions=table["position"].to_numpy(zero_copy_only=False),
            phases=_phases(table["is_prompt"]),
            requests=np.array(numbers, np.uint64)[number],
        ),
        keys=[(ids[one], index) for one, index in pairs.T.tolist()],
        places=places.reshape(-1),
        num_missing=num_missing,
        done=done,
        token_texts=_token_texts(table, tokens) if "token" in table.schema.names else {},
    )


def _phases(is_prompt: Any) -> npt.NDArray[np.uint8]:  # noqa: ANN401
    """Return an index into `PHASES` of each row: unknown where the column is null."""
    prompts = is_prompt.fill_null(False).to_numpy(zero_copy_only=False)
    phases = np.where(prompts, PHASES.index("prompt"), PHASES.index("output"))
    known = is_prompt.is_valid().to_numpy(zero_copy_only=False)
    return np.where(known, phases, PHASES.index("unknown")).astype(np.uint8)


def _token_texts(table: Any, tokens: npt.NDArray[np.int32]) -> dict[int, str]:  # noqa: ANN401
    """Return the text of each token id, where the rows have it."""
    ids, first = np.unique(tokens, return_index=True)
    texts = _text(table["token"]).take(first).to_pylist()
    pairs = zip(ids.tolist(), texts, strict=True)
    return {token: text for token, text in pairs if token != NO_TOKEN and text is not None}


def _text(column: Any) -> Any:  # noqa: ANN401
    import pyarrow as pa  # noqa: PLC0415

    return column.cast(pa.string())


def _flat(column: Any, model: Model) -> npt.NDArray[Any]:  # noqa: ANN401
    """Return a column of lists, none of them null, as ``[num_rows, num_layers, top_k]``."""
    flat = column.flatten().flatten().to_numpy(zero_copy_only=False)
    array: npt.NDArray[Any] = flat.reshape(len(column), len(model.layers), model.top_k)
    return array
