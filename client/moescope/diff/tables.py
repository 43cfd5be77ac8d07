"""The tables of a comparison, and the numbers of ``diff.json``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moescope._version import __version__
from moescope.diff import findings
from moescope.diff.comparing import Comparison
from moescope.diff.pairing import NEVER
from moescope.diff.result import Result

Table = tuple[list[str], Iterator[list[Any]]]


def by_layer(result: Result) -> Table:
    """Return a table with a line a layer: each figure, its interval, the noise, what changed."""
    columns: dict[str, Any] = {"layer": list(result.layers)}
    for name, one in result.found.items():
        columns |= {
            name: one.values,
            f"{name}_from": one.interval[0],
            f"{name}_to": one.interval[1],
        }
        if one.noise is not None:
            columns[f"{name}_noise"] = one.noise
        if one.changed is not None:
            columns[f"{name}_changed"] = one.changed.astype(int)
    columns["largest_gap"] = result.comparison.differences.largest_gap
    return list(columns), ([*line] for line in zip(*columns.values(), strict=True))


def by_sequence(result: Result) -> Table:
    """Return a table with a line for each pair of sequences: where they first differ."""
    header = [
        *("request_id_a", "request_id_b", "index", "prompt_tokens", "text_position"),
        *("experts_position", "experts_layer", "beyond_position", "beyond_layer"),
    ]
    return header, _sequences(result)


def _sequences(result: Result) -> Iterator[list[Any]]:
    comparison, (a, b) = result.comparison, result.sides[:2]
    pairs = comparison.pairs
    for number, (place, other) in enumerate(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)):
        one = a.sequences[place]
        yield [
            *(one.request_id, b.sequences[other].request_id, one.index, one.prompt_len),
            _position(int(pairs.divergence[number])),
            *_place(comparison.first[number].tolist()),
            *_place(comparison.first_beyond[number].tolist()),
        ]


def _position(position: int) -> int | None:
    return None if position >= NEVER else position


def _place(place: list[int]) -> tuple[int | None, int | None]:
    """Return position and layer; None where there is none."""
    return (None, None) if place[0] >= NEVER else (place[0], place[1])


def values(result: Result) -> dict[str, Any]:
    """Return what ``diff.json`` has."""
    model = result.sides[0].model
    names = ("a", "b", "again")
    return {
        "moescope": __version__,
        "layers": list(result.layers),
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "near_tie": result.near_tie,
        "seed": result.seed,
        **{
            name: {
                "inputs": [str(one.path) for one in source.inputs],
                "filter": source.inputs[0].where.given,
                "model": side.model.name,
                "sequences": len(side.sequences),
                "rows": side.num_rows,
                "missing_rows": side.num_missing,
            }
            for name, source, side in zip(names, result.sources, result.sides, strict=False)
        },
        "compared": _compared(result.comparison),
        "compared_again": _compared(result.again) if result.again else None,
        "totals": findings.totals(result.comparison, result.found),
        "first_changed_layer": {
            name: findings.first_changed(result.found[name], result.layers)
            for name in findings.CHANGES
        },
        "largest_gap": result.comparison.differences.largest_gap,
        "by_layer": {name: one.as_json() for name, one in result.found.items()},
    }


def _compared(comparison: Comparison) -> dict[str, Any]:
    pairs = comparison.pairs
    return {
        "sequences": len(pairs),
        "paired_by_id": pairs.num_by_id,
        "texts_known": int(pairs.has_texts.sum()),
        "texts_diverged": int(pairs.diverged.sum()),
        "rows": comparison.num_rows,
        "rows_after_divergence": comparison.num_after,
        "rows_of_a_alone": comparison.num_alone[0],
        "rows_of_b_alone": comparison.num_alone[1],
    }
