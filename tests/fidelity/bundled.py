"""The bundled model's reference: the same tokens through HF transformers, in float64."""

from __future__ import annotations

import collections
import dataclasses
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
"""What float32 leaves of a weight after six layers and some hundred tokens of context.

Experts whose probabilities are closer than that are *tied*: float32 may take either.
"""


@functools.cache
def reference_model() -> Any:
    """Return the model in float64, whose rounding does not count beside float32's."""
    return AutoModelForCausalLM.from_pretrained(
        bundled_model.path(), dtype=torch.float64, experts_implementation="eager"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Routes:
    """What the model does with a sequence."""

    topk_ids: np.ndarray
    """Sorted expert ids ``[num_tokens, num_layers, top_k]``."""
    topk_weights: np.ndarray
    """Their weights, float64, in the same order."""
    ties: int = 0
    """(Row, layer) pairs with experts that are not the gate's own but tied with them."""


_recent: collections.deque[tuple[Any, np.ndarray, Routes]]
_recent = collections.deque(maxlen=16)


def reference(model: Any, token_ids: np.ndarray) -> Routes:
    """Return HF's routes of a sequence.

    The model is causal: the beginning of a sequence of a moment ago is not computed again.
    """
    length = len(token_ids)
    for of_model, known, routes in _recent:
        if of_model is model and np.array_equal(known[:length], token_ids):
            return Routes(routes.topk_ids[:length], routes.topk_weights[:length])
    _recent.appendleft((model, token_ids, _run(model, token_ids)))
    return _recent[0][2]


def _run(model: Any, token_ids: np.ndarray, offered: np.ndarray | None = None) -> Routes:
    """Run the model, with the experts offered (``[num_tokens, num_layers, top_k]``) where tied."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    gated: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def route(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, gate_weights, own = output
        probabilities = logits.double().softmax(-1)
        ids = own.sort(-1).values
        if offered is not None:
            other = torch.from_numpy(offered[:, len(gated)].astype(np.int64)).sort(-1).values
            ids = torch.where(_are_tied(probabilities, other)[:, None], other, ids)
        weights = probabilities.gather(-1, ids)  # which the model does not renormalize
        gated.append((ids, weights, int((ids != own.sort(-1).values).any(-1).sum())))
        return logits, weights.to(gate_weights.dtype), ids

    hooks = [gate.register_forward_hook(route) for gate in gates]
    try:
        with torch.inference_mode():
            model(torch.from_numpy(token_ids)[None].long())
    finally:
        for hook in hooks:
            hook.remove()
    ids, weights, ties = zip(*gated, strict=True)
    return Routes(torch.stack(ids, 1).numpy(), torch.stack(weights, 1).numpy(), sum(ties))


def _are_tied(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return which rows of sorted ``ids`` are as good as the top-k: bool ``[num_tokens]``."""
    taken = probabilities.gather(-1, ids).amin(-1)
    left = probabilities.scatter(-1, ids, 0.0).amax(-1)
    return (ids.diff(dim=-1) > 0).all(-1) & (taken >= left - WEIGHT_TOLERANCE)


def reference_of(trace: RouteTrace, model: Any = None) -> Routes:
    """Return HF's routes of a trace's rows.

    Where experts are tied, the rest of the sequence depends on which are taken: beside a trace
    that differs the model goes on with the trace's experts there.

    Args:
        trace: The trace, with its tokens.
        model: A model in float64; `reference_model` where None.
    """
    assert trace.token_ids is not None
    model = model or reference_model()
    token_ids = trace.token_ids[: trace.num_rows]
    routes = reference(model, token_ids)
    ids = np.sort(trace.topk_ids, axis=-1)
    if not np.array_equal(ids[trace.present], routes.topk_ids[trace.present]):
        routes = _run(model, token_ids, offered=ids)
    return routes


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
    want = reference_of(trace, model)
    order = np.argsort(trace.topk_ids, axis=-1)
    ids = np.take_along_axis(trace.topk_ids, order, -1)
    np.testing.assert_array_equal(ids[here], want.topk_ids[here])
    weights = np.take_along_axis(trace.topk_weights, order, -1)
    np.testing.assert_allclose(
        weights[here], want.topk_weights[here], rtol=0, atol=WEIGHT_TOLERANCE
    )
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
        errors, ties = zip(*(compare(trace, self._model) for trace in longest_first), strict=True)
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
                ties=sum(ties),
                layout=self._layout,
                machine=machine,
            )
        )


def steps_in(log: str) -> list[list[tuple[str, int, int, int]]]:
    """Return (id, first position, rows, prompt length) of every step's sequences, from a log."""
    found = re.findall(r"moescope collector: step \d+ (\[.*\])$", log, re.MULTILINE)
    return [json.loads(step) for step in found]
