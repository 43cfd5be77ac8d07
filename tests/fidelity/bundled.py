"""The bundled model's reference: the same tokens through HF transformers, in float64."""

from __future__ import annotations

import collections
import functools
import json
import re
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from moescope import RouteTrace
from moescope_service import bundled_model
from tests.fidelity.cells import Cell, record

SCHEME = "softmax (Qwen2-MoE, bundled)"
WEIGHT_TOLERANCE = 4e-6
"""What float32 leaves of a weight after six layers and some hundred tokens of context."""


@functools.cache
def reference_model() -> Any:
    """Return the model in float64, whose rounding does not count beside float32's."""
    return AutoModelForCausalLM.from_pretrained(
        bundled_model.path(), dtype=torch.float64, experts_implementation="eager"
    )


_recent: collections.deque[tuple[Any, np.ndarray, tuple[np.ndarray, np.ndarray]]]
_recent = collections.deque(maxlen=16)


def reference(model: Any, token_ids: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return HF's (ids sorted, their weights), ``[num_tokens, num_layers, top_k]`` each.

    The model is causal: the beginning of a sequence of a moment ago is not computed again.
    """
    length = len(token_ids)
    for of_model, known, (ids, weights) in _recent:
        if of_model is model and np.array_equal(known[:length], token_ids):
            return ids[:length], weights[:length]
    _recent.appendleft((model, token_ids, _compute(model, token_ids, top_k)))
    return _recent[0][2]


def _compute(model: Any, token_ids: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        output = model(torch.from_numpy(token_ids)[None].long(), output_router_logits=True)
    probabilities = torch.stack(output.router_logits, dim=1).double().softmax(-1)
    weights, ids = probabilities.topk(top_k)
    if model.config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    ids, order = ids.sort(-1)
    return ids.numpy(), weights.gather(-1, order).numpy()


def compare(trace: RouteTrace, model: Any = None) -> float:
    """Compare every row and layer that is there with the reference.

    Args:
        trace: The trace.
        model: A model in float64; `reference_model` where None.

    Returns:
        The largest error of a weight.

    Raises:
        AssertionError: A set of experts is another one, or a weight is off by more than
            `WEIGHT_TOLERANCE`.
    """
    assert trace.token_ids is not None
    assert trace.topk_weights is not None
    assert trace.topk_weights.dtype == np.float32
    here = trace.present
    if not here.any():
        return 0.0
    model = model or reference_model()
    want_ids, want_weights = reference(model, trace.token_ids[: trace.num_rows], trace.top_k)
    order = np.argsort(trace.topk_ids, axis=-1)
    ids = np.take_along_axis(trace.topk_ids, order, -1)
    np.testing.assert_array_equal(ids[here], want_ids[here])
    weights = np.take_along_axis(trace.topk_weights, order, -1)
    np.testing.assert_allclose(weights[here], want_weights[here], rtol=0, atol=WEIGHT_TOLERANCE)
    return float(np.abs(weights - want_weights)[here].max())


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
        self.rows = self.missing = 0
        """(Row, layer) pairs, and those of them that are missing."""

    def add(self, *traces: RouteTrace, missing: int = 0) -> None:
        """Take in traces; in all of them together so many rows are missing, and no other."""
        rows = sum(int((~trace.present).sum()) for trace in traces)
        assert rows == missing, f"{rows} rows are missing"
        for trace in traces:
            assert trace.num_rows == max(trace.num_tokens - 1, 0)
            assert trace.complete == bool(trace.present.all())
            self.rows += trace.num_rows * trace.num_layers
            self.missing += int((~trace.present).sum()) * trace.num_layers
        self._traces += traces

    def record(self) -> None:
        """Compare all of them and record the cell; long sequences first, which hold short ones."""
        assert self.rows, "there is nothing to compare"
        longest_first = sorted(self._traces, key=lambda trace: -trace.num_tokens)
        errors = [compare(trace, self._model) for trace in longest_first]
        equal = self.rows - self.missing
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        record(
            Cell(
                SCHEME,
                self._situation,
                self.rows,
                equal,
                self.missing,
                largest_weight_error=max(errors),
                layout=self._layout,
                machine=machine,
            )
        )


def steps_in(log: str) -> list[list[tuple[str, int, int, int]]]:
    """Return (id, first position, rows, prompt length) of every step's sequences, from a log."""
    found = re.findall(r"moescope collector: step \d+ (\[.*\])$", log, re.MULTILINE)
    return [json.loads(step) for step in found]
