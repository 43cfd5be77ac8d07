"""Reads the inputs of ``moescope view`` into traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moescope.analyze import inputs
from moescope.analyze.batches import Model
from moescope.analyze.inputs import Input
from moescope.errors import CommandError
from moescope.route_files import Kept
from moescope.view.shown import Selection, Shown


def read(
    found: Sequence[Input],
    selection: Selection,
    *,
    folder: Path | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
) -> None:
    """Read inputs, one trace after the other.

    Args:
        found: The inputs.
        selection: Where their requests go.
        folder: As of `inputs.traces`.
        num_experts: Routed experts a layer, for a route log that does not say it.
        top_k: Experts a token and layer, for a route log that does not say it.

    Raises:
        CommandError: They are of several models, have too much, or nothing to show.
        FormatError: A file is broken.
    """
    for one in found:
        for _, kept in inputs.traces(one, num_experts, top_k, folder=folder):
            _add(one.path, kept, selection)
    if not any(one.trace.present.any() for one in selection.traces):
        raise CommandError("the inputs have no routed token: there is nothing to show")


def _add(path: Path, kept: Kept, selection: Selection) -> None:
    trace = kept.trace
    selection.enter(path, Model.of(trace))
    if trace.start or trace.num_rows < trace.num_tokens - 1:
        raise CommandError(
            f"{path} holds {trace.num_rows:,} rows of {trace.request_id}, from row {trace.start} "
            f"on, and that has {trace.num_tokens - 1:,}: view shows whole requests; fetch it "
            "without start and limit"
        )
    if selection.wants(trace.request_id):
        selection.add(Shown(trace=trace, has_phases=kept.knows_prompt))
