"""Routes of every scheme that vLLM serves on the CPU are those of HF transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moescope import RouteTrace, Source, formats

from .cells import Cell, record
from .checkpoints import Reference
from .conftest import place
from .schemes import SCHEMES, UNSERVED, Scheme

WEIGHT_TOLERANCE = 1e-6
"""vLLM computes in float32, the reference in float64; weights are at most a few times 1."""
SITUATION = "offline: chunks, batches, prefix hits"


def load(out: Path) -> list[RouteTrace]:
    error = out.with_suffix(".error")
    assert not error.exists(), error.read_text()
    return formats.load_npz(out.read_bytes())


def compare(traces: list[RouteTrace], reference: Reference, scheme: Scheme, situation: str) -> None:
    """Compare all rows, record the cell, and then demand that all are equal."""
    rows = equal = missing = 0
    largest_error = 0.0
    for trace in traces:
        assert trace.token_ids is not None
        assert trace.topk_weights is not None
        want_ids, want_weights = reference.routes(trace.token_ids[:-1])
        order = np.argsort(trace.topk_ids, axis=-1)
        is_equal = (np.take_along_axis(trace.topk_ids, order, -1) == want_ids).all(-1)
        is_equal &= trace.present[:, None]
        errors = np.abs(np.take_along_axis(trace.topk_weights, order, -1) - want_weights)
        rows += is_equal.size
        equal += int(is_equal.sum())
        missing += int((~trace.present).sum()) * trace.num_layers
        largest_error = max(largest_error, float(errors[is_equal].max(initial=0.0)))
    record(Cell(scheme.name, situation, rows, equal, missing, largest_error))
    assert (equal, missing) == (rows, 0)
    assert largest_error <= WEIGHT_TOLERANCE


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_routes_equal_those_of_hf_transformers(scheme: Scheme, models: Path, traced: Path) -> None:
    traces = load(place(traced, scheme).with_suffix(".npz"))
    for trace in traces:
        assert trace.complete
        assert trace.layers.tolist() == list(scheme.layers)
        assert (trace.num_experts, trace.top_k) == (scheme.num_experts, scheme.top_k)
        assert trace.topk_ids.dtype == (np.uint8 if scheme.num_experts <= 256 else np.uint16)
    sources = np.concatenate([trace.source for trace in traces])
    if scheme.has_prefix_cache:
        assert (sources == Source.CACHED).sum() > 500, "few rows came from the prefix cache"
    reference = Reference(scheme, place(models, scheme))
    compare(traces, reference, scheme, SITUATION)
    if scheme.alternative is not None:
        tokens = traces[0].token_ids[:-1]
        own, other = reference.routes(tokens), reference.routes(tokens, alternative=True)
        assert any(not np.allclose(a, b) for a, b in zip(own, other, strict=True)), (
            "the model does not show what its scheme is about"
        )


def test_compiled_routes_equal_those_of_hf_transformers(models: Path, traced: Path) -> None:
    """The last model of the process, compiled: its graph may be an earlier process' one."""
    scheme = SCHEMES[0]
    reference = Reference(scheme, place(models, scheme))
    traces = load(traced / "compiled.npz")
    assert all(trace.complete for trace in traces)
    compare(traces, reference, scheme, "the same, compiled")


def test_what_the_cpu_build_does_not_serve_is_its_own_refusal(traced: Path) -> None:
    """Once this fails, the scheme belongs to the others."""
    error = place(traced, UNSERVED).with_suffix(".error").read_text()
    assert 'assert self.scoring_func == "softmax"' in error
