"""The formats of traces: JSON, ``.npz``, vLLM's ``.npy``, and JSON Lines as ``VLLM_LOG_MOE`` has.

``.npz`` holds any number of traces ragged: the rows of all of them one after the other in
``topk_ids``, ``topk_weights`` and ``source``, their tokens in ``token_ids``; trace ``i`` has rows
``row_splits[i]:row_splits[i + 1]`` and tokens ``token_splits[i]:token_splits[i + 1]``, and
``version_splits`` splits ``weights_versions`` in the same way. ``meta`` is a JSON list with
everything else; so is ``tokens``, where the text of tokens was asked for: a list of strings for
each trace. With one trace the arrays are that trace's own.

A response is bounded. Where it is ``truncated``, it lacks rows, from ``next_start`` on in each
trace (a page begins at its trace's ``start``), or older requests of an id that clients used again.
Then ``.npz`` has members of these names; JSON, the meta line of JSON Lines and the metadata of
Arrow and Parquet have ``"truncated": true`` and, where rows are lacking, ``"next_start"``.
"""

from __future__ import annotations

from moescope.formats.as_json import dump_json, from_dict, to_dict, to_fragments
from moescope.formats.as_npz import arrays_of, dump_npz, load_npz, read_npz, spans, traces_of
from moescope.formats.as_vllm import dump_npy, meta_line, route_lines, routed_experts
from moescope.formats.shared import SOURCE_NAMES, check_alike, id_dtype, marks, meta, meta_of

__all__ = [
    "SOURCE_NAMES",
    "arrays_of",
    "check_alike",
    "dump_json",
    "dump_npy",
    "dump_npz",
    "from_dict",
    "id_dtype",
    "load_npz",
    "marks",
    "meta",
    "meta_line",
    "meta_of",
    "read_npz",
    "route_lines",
    "routed_experts",
    "spans",
    "to_dict",
    "to_fragments",
    "traces_of",
]
