"""Traces of the bundled model compared with its reference, and what the comparisons count."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import torch

from benchmarks.fidelity.cells import Cell, record
from benchmarks.fidelity.reference import WEIGHT_TOLERANCE, Routes, reference_of
from moescope import RouteTrace

SCHEME = "softmax (Qwen2-MoE, bundled)"


def compare(trace: RouteTrace, model: Any = None) -> tuple[float, int]:
    """Compare every row and layer that is there with the reference.

    Args:
        trace: The trace.
        model: A model in float64; `reference_model` where None.

    Returns:
        The largest error of a weight, and the number of ties that float32 decided otherwise.

    Raises:
        AssertionError: A set of experts is another one, or a weight is off by more than
            `WEIGHT_TOLERANCE`.
    """
    assert trace.topk_weights is not None
    assert trace.topk_weights.dtype == np.float32
    here = trace.present
    if not here.any():
        return 0.0, 0
    return check(trace, reference_of(trace, model))


def check(
    trace: RouteTrace, want: Routes, tolerance: float = WEIGHT_TOLERANCE
) -> tuple[float, int]:
    """Do what `compare` does, with what the reference has computed."""
    assert trace.topk_weights is not None
    here = trace.present
    order = np.argsort(trace.topk_ids, axis=-1)
    ids = np.take_along_axis(trace.topk_ids, order, -1)
    np.testing.assert_array_equal(ids[here], want.topk_ids[here])
    weights = np.take_along_axis(trace.topk_weights, order, -1)
    np.testing.assert_allclose(weights[here], want.topk_weights[here], rtol=0, atol=tolerance)
    return float(np.abs(weights - want.topk_weights)[here].max()), want.ties


class Tally:
    """Compares the traces of one situation, and records what it counted as a cell.

    Args:
        situation: What the requests went through.
        model: A model in float64; `reference_model` where None.
        layout: The workers.
    """

    def __init__(self, situation: str, model: Any = None, *, layout: str = "1 worker") -> None:
        self._situation, self._model, self._layout = situation, model, layout
        self._traces: list[RouteTrace] = []
        self.pairs = self.missing = 0
        """(Token, layer) pairs, and those of them that are missing."""

    def add(self, *traces: RouteTrace, missing: int = 0) -> None:
        """Take in traces; in all of them together so many rows are missing, and no other."""
        rows = sum(int((~trace.present).sum()) for trace in traces)
        assert rows == missing, f"{rows} rows are missing"
        for trace in traces:
            assert trace.num_rows == max(trace.num_tokens - 1, 0)
            assert trace.complete == bool(trace.present.all())
            self.pairs += trace.num_rows * trace.num_layers
            self.missing += int((~trace.present).sum()) * trace.num_layers
        self._traces += traces

    def record(self) -> None:
        """Compare all of them and record the cell; long sequences first, which hold short ones."""
        assert self.pairs, "there is nothing to compare"
        longest_first = sorted(self._traces, key=lambda trace: -trace.num_tokens)
        errors, ties = zip(*(compare(trace, self._model) for trace in longest_first), strict=True)
        equal = self.pairs - self.missing
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        record(
            Cell(
                SCHEME,
                self._situation,
                self.pairs,
                equal,
                self.missing,
                largest_weight_error=max(errors),
                ties=sum(ties),
                layout=self._layout,
                machine=machine,
            )
        )


def steps_in(log: str) -> list[list[tuple[str, int, int, int]]]:
    """Return (id, first position, rows, prompt length) of every step's sequences, from a log."""
    found = re.findall(r"moescope collector: step \d+ (\[.*\])$", log, re.MULTILINE)
    return [json.loads(step) for step in found]
