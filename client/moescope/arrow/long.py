"""The long form of a table of traces: one row a selection, which is a token, a layer and a rank.

===================  ========================================================================
``request_id``       as in the wide form (`moescope.arrow.wide`), and so are the next ones
``index``
``position``
``is_prompt``
``token_id``
``token``            where the wide form has it
``layer``            int32: the model's own layer number
``rank``             int16: the place in the router's order, from 0
``expert``           uint8 or uint16; null in a missing row
``weight``           float32; null in a missing row, no such column where weights were left out
``source``           as in the wide form
``weights_version``  as in the wide form
===================  ========================================================================

A row of a trace has ``num_layers * top_k`` rows here. The last sampled token, which was never
routed, has none; nor has a missing row, unless it is asked for. The schema's metadata says of what
model the table is; traces cannot be made of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

METADATA = b"moescope"
"""The key of the schema's metadata, in both forms."""
_BEFORE = ("request_id", "index", "position", "is_prompt", "token_id", "token")
_AFTER = ("source", "weights_version")


def of(wide: pa.Table, *, missing: bool = False) -> pa.Table:
    """Return the long form of a table.

    Args:
        wide: Of `moescope.arrow.to_table`, or some rows of it, with its metadata.
        missing: Whether missing rows are there, with null experts and weights.
    """
    shared = orjson.loads(wide.schema.metadata[METADATA])
    wide = wide.filter(wide["source" if missing else "topk_ids"].is_valid())
    layers, top_k = np.array(shared["layers"], np.int32), shared["top_k"]
    cells = len(layers) * top_k
    rows = pa.array(np.repeat(np.arange(len(wide)), cells))
    present = np.repeat(wide["topk_ids"].is_valid().to_numpy(), cells)

    def repeated(names: tuple[str, ...]) -> dict[str, pa.ChunkedArray]:
        return {name: wide[name].take(rows) for name in names if name in wide.column_names}

    columns: dict[str, Any] = {
        **repeated(_BEFORE),
        "layer": np.tile(np.repeat(layers, top_k), len(wide)),
        "rank": np.tile(np.arange(top_k, dtype=np.int16), len(wide) * len(layers)),
        "expert": _selections(wide["topk_ids"], present),
    }
    if "topk_weights" in wide.column_names:
        columns["weight"] = _selections(wide["topk_weights"], present)
    return pa.table({**columns, **repeated(_AFTER)}, metadata={METADATA: _metadata(shared)})


def _selections(lists: pa.ChunkedArray, present: npt.NDArray[np.bool_]) -> pa.Array:
    """Return the values of nested lists one after the other, null where a row has none."""
    flat = pc.list_flatten(pc.list_flatten(lists)).to_numpy()
    values = np.zeros(len(present), flat.dtype)
    values[present] = flat
    return pa.array(values, mask=None if present.all() else ~present)


def _metadata(shared: dict[str, Any]) -> bytes:
    of_model = {name: shared["traces"][0][name] for name in ("model", "num_experts")}
    kept = {name: shared[name] for name in ("layers", "top_k")}
    return orjson.dumps({"form": "long", **of_model, **kept})
