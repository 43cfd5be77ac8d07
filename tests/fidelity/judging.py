"""Traces of a scheme's model judged as `moescope verify` judges them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from moescope import RouteTrace
from moescope_service.verify.comparison import Counts, Expected, Tolerance, compare
from moescope_service.verify.reference import Reference

from .schemes import Scheme


@dataclasses.dataclass
class Judged:
    """A model's traces, and what the reference computes for them."""

    reference: Reference
    traces: list[RouteTrace]
    expected: list[Expected]

    def compare(self, traces: Sequence[RouteTrace]) -> Counts:
        """Compare traces with what was computed for the served ones."""
        total, tolerance = Counts(), Tolerance.of(self.expected, self.reference.eps)
        for trace, want in zip(traces, self.expected, strict=True):
            total.add(compare(trace, want, tolerance, self.reference.route))
        return total

    def changed(self, **changes: np.ndarray) -> Counts:
        """Compare the traces, the first of which, that of the longest prompt, is changed."""
        first, *others = self.traces
        return self.compare([dataclasses.replace(first, **changes), *others])


def judge(scheme: Scheme, model: Path, dtype: str, traces: list[RouteTrace]) -> Judged:
    """Compute what the reference has after the experts of the traces."""
    reference = Reference(str(model), scheme.layers, "float64", dtype, "cpu")
    expected = [reference.follow(trace.token_ids[:-1], trace) for trace in traces]
    return Judged(reference, traces, expected)


def without_bias(model: Path, copy: Path) -> Path:
    """Write the checkpoint that vLLM's CPU build computes of one with a selection bias."""
    copy.mkdir()
    (copy / "config.json").write_bytes((model / "config.json").read_bytes())
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias"):
            weight.zero_()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy
