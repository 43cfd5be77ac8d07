"""Routes of every scheme that vLLM serves on the CPU are those of HF transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.fidelity.cells import Cell, record
from moescope import RouteTrace, Source, formats
from moescope_service.vllm_contract.versions import vllm_version

from .checkpoints import Reference
from .conftest import place
from .judging import judge
from .schemes import SCHEMES, UNSERVED, Scheme

WEIGHT_TOLERANCE = 1e-5
"""vLLM computes in float32, the reference in float64; weights are at most a few times 1. Machines
differ by their vector units: 8.2e-7 was the largest error on one, 6.7e-6 on another."""
MAX_TIES = 0.002
"""Of all pairs."""
SITUATION = "offline: chunks, batches, prefix hits"


def load(out: Path) -> list[RouteTrace]:
    error = out.with_suffix(".error")
    said = error.read_text() if error.exists() else ""
    if vllm_version().startswith("0.30.") and "expected scalar type BFloat16 but found" in said:
        pytest.skip("the CPU build of vLLM 0.30 serves attention sinks (GPT-OSS) in bfloat16 alone")
    assert not said, said
    return formats.load_npz(out.read_bytes())


def compare(
    traces: list[RouteTrace],
    model: Path,
    scheme: Scheme,
    situation: str,
    layout: str = "1 worker",
) -> None:
    """Compare all rows, record the cell, and then demand that all are equal, but for ties.

    Which experts two machines take for a tie differs with their kernels, and from then on the
    token's hidden states do: where a set of experts is another one, all pairs are judged after
    those that were served.
    """
    reference = Reference(scheme, model)
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
    ties = 0
    if equal + missing < rows:
        judged = judge(scheme, model, "float32", traces).compare(traces)
        ties, largest_error = judged.near_ties, judged.largest_weight_error
        assert judged.is_good, "\n".join(map(str, judged.differences))
        equal = judged.equal + ties
    cell = Cell(scheme.name, situation, rows, equal, missing, largest_error, layout, ties=ties)
    record(cell)
    assert (equal, missing) == (rows, 0)
    assert ties <= MAX_TIES * rows
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
    compare(traces, place(models, scheme), scheme, SITUATION)
    if scheme.alternative is not None:
        reference, tokens = Reference(scheme, place(models, scheme)), traces[0].token_ids[:-1]
        own, other = reference.routes(tokens), reference.routes(tokens, alternative=True)
        assert any(not np.allclose(a, b) for a, b in zip(own, other, strict=True)), (
            "the model does not show what its scheme is about"
        )


def test_compiled_routes_equal_those_of_hf_transformers(models: Path, traced: Path) -> None:
    """The last model of the process, compiled: its graph may be an earlier process' one."""
    scheme = SCHEMES[0]
    traces = load(traced / "compiled.npz")
    assert all(trace.complete for trace in traces)
    compare(traces, place(models, scheme), scheme, "the same, compiled")


def test_what_the_cpu_build_does_not_serve_is_its_own_refusal(traced: Path) -> None:
    """Once this fails, the scheme belongs to the others."""
    error = place(traced, UNSERVED).with_suffix(".error").read_text()
    assert 'assert self.scoring_func == "softmax"' in error
