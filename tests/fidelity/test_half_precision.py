"""`moescope verify` passes a right server in half precision, whatever the scheme, and no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fidelity.cells import Cell, record
from moescope import Source, formats
from moescope.errors import CommandError
from moescope_service.verify.comparison import Counts
from moescope_service.verify.reference import Reference
from moescope_service.verify.run import MIN_CONTROL

from .conftest import HALVED, halved_place, place
from .judging import Judged, judge, without_bias
from .schemes import HYBRID, SCHEMES, Scheme

MISCOMPUTED = {("sigmoid with bias, shared expert (GLM-4 MoE)", "float16")}
"""vLLM 0.32.0 computes another model than the published: in float16 it divides the output of a
layer's experts by ``routed_scaling_factor`` (``moe_runner.py``,
``_maybe_apply_routed_scale_to_output``), and does not rescale the residual as for DeepSeek."""


RIGHT = [(scheme, dtype) for scheme, dtype in HALVED if (scheme.name, dtype) not in MISCOMPUTED]


@pytest.fixture(
    params=RIGHT,
    ids=lambda param: f"{param[0].name}, {param[1]}",
)
def judged(request: pytest.FixtureRequest, models: Path, halved: Path, tmp_path: Path) -> Judged:
    scheme, dtype = request.param
    out, model = halved_place(halved, scheme, dtype), place(models, scheme)
    error = out.with_suffix(".error")
    assert not error.exists(), error.read_text()
    if not scheme.has_bias_in_vllm:
        model = without_bias(model, tmp_path / "model")
    return judge(scheme, model, dtype, formats.load_npz(out.read_bytes()))


def test_a_right_server_passes_and_no_other(judged: Judged) -> None:
    check_a_right_server(judged)


def check_a_right_server(judged: Judged) -> Counts:
    right = judged.compare(judged.traces)
    assert right.is_good, "\n".join(map(str, right.differences))
    assert right.pairs > 2000
    assert right.largest_gap < 0.7, "little room is left"
    check_a_wrong_expert(judged)
    check_shifted_rows(judged)
    if judged.traces[0].top_k > 1:
        check_swapped_weights(judged)
    return right


def test_rows_of_a_model_that_mixes_linear_attention(models: Path, halved: Path) -> None:
    """Its KV blocks are of two kinds, and a prefix hit needs both: whole blocks of 96 tokens."""
    traces = formats.load_npz(halved_place(halved, HYBRID, "bfloat16").read_bytes())
    assert all(trace.complete for trace in traces)
    assert all(trace.topk_ids.dtype == np.uint16 for trace in traces)
    sources = np.concatenate([trace.source for trace in traces])
    assert (sources == Source.CACHED).sum() > 500, "few rows came from the prefix cache"
    judged = judge(HYBRID, place(models, HYBRID), "bfloat16", traces)
    counts = check_a_right_server(judged)
    equal = counts.equal + counts.near_ties
    record(
        Cell(
            HYBRID.name,
            "bfloat16, offline: chunks, batches, prefix hits",
            counts.pairs,
            equal,
            counts.missing,
            counts.largest_weight_error,
            ties=counts.near_ties,
        )
    )
    assert (equal, counts.missing) == (counts.pairs, 0)


def check_a_wrong_expert(judged: Judged) -> None:
    trace, want = judged.traces[0], judged.expected[0]
    ids, row = trace.topk_ids.copy(), trace.num_rows // 2
    ids[row, -1, -1] = want.logits[row, -1].argmin()
    wrong = judged.changed(topk_ids=ids)
    assert (wrong.mismatches, wrong.is_good) == (1, False)
    (difference,) = wrong.differences
    assert (difference.request_id, difference.position) == (trace.request_id, row)
    assert difference.layer == trace.layers[-1]


def check_shifted_rows(judged: Judged) -> None:
    trace = judged.traces[0]
    wrong = judged.changed(topk_ids=np.roll(trace.topk_ids, 1, axis=0))
    assert wrong.mismatches > MIN_CONTROL * trace.num_rows * trace.num_layers


def check_swapped_weights(judged: Judged) -> None:
    trace = judged.traces[0]
    assert trace.topk_weights is not None
    swapped = judged.changed(topk_weights=trace.topk_weights[..., ::-1])
    assert swapped.mismatches == 0
    assert swapped.wrong_weights > 0


WRONG = [
    (scheme, dtype)
    for scheme, dtype in HALVED
    if not scheme.has_bias_in_vllm or (scheme.name, dtype) in MISCOMPUTED
]


@pytest.mark.parametrize(
    ("scheme", "dtype"), WRONG, ids=[f"{scheme.name}, {dtype}" for scheme, dtype in WRONG]
)
def test_a_server_that_computes_another_model_fails(
    scheme: Scheme, dtype: str, models: Path, halved: Path
) -> None:
    """Once this fails, vLLM computes what was published."""
    traces = formats.load_npz(halved_place(halved, scheme, dtype).read_bytes())
    counts = judge(scheme, place(models, scheme), dtype, traces).compare(traces)
    assert counts.mismatches > 50


@pytest.mark.parametrize("scheme", SCHEMES[:1], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 61}, "with 4 of 61 experts, the checkpoint .* 4 of 60"),
        ({"num_hidden_layers": 9, "layers": np.array([0, 1, 7], np.int32)}, r"\[0, 1, 7\]"),
    ],
    ids=["experts", "layers"],
)
def test_a_trace_of_another_model_is_told(
    scheme: Scheme, models: Path, halved: Path, changes: dict, words: str
) -> None:
    (trace, *_) = formats.load_npz(halved_place(halved, scheme, "bfloat16").read_bytes())
    with pytest.raises(CommandError, match=words):
        judge(scheme, place(models, scheme), "bfloat16", [dataclasses.replace(trace, **changes)])


@pytest.mark.parametrize("scheme", SCHEMES[:1], ids=lambda scheme: scheme.name)
def test_a_token_beyond_the_vocabulary_is_told(scheme: Scheme, models: Path, halved: Path) -> None:
    (trace, *_) = formats.load_npz(halved_place(halved, scheme, "bfloat16").read_bytes())
    reference = Reference(str(place(models, scheme)), scheme.layers, "float64", "bfloat16", "cpu")
    tokens = trace.token_ids[:-1].copy()
    tokens[5] = 512
    with pytest.raises(CommandError, match=r"has the token 512, the checkpoint.s vocabulary 512"):
        reference.follow(tokens, trace)


def test_a_reference_that_is_no_more_exact_than_the_server_is_refused(models: Path) -> None:
    with pytest.raises(CommandError, match="no yardstick for a server in float32"):
        Reference(str(place(models, SCHEMES[0])), (0, 1, 2), "float32", "float32", "cpu")
