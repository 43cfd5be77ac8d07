"""What steps read: distinct experts by layer, and the tokens of the busiest one.

A step reads the weights of each expert that any of its tokens goes to, and reads them once. So what
it costs depends on how many experts are distinct in it, beside how many tokens it has.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moescope_service.histogram import KINDS, MIN_TOKENS, expert_bounds
from moescope_service.messages import CaptureSpec, Step

Counts = npt.NDArray[np.int64]
_SUMS = ("steps", "tokens", "distinct", "busiest", "histogram")


class StepFigures:
    """Sums over the steps of one engine, by kind and size; none of them goes back.

    Args:
        num_layers: Captured layers of the whole engine.
        num_experts: Routed experts a layer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        by_size = (len(KINDS), len(MIN_TOKENS))
        self._bounds = np.array(expert_bounds(num_experts))
        self.steps = np.zeros(by_size, np.int64)
        """Steps, ``[num_kinds, num_sizes]``."""
        self.tokens = np.zeros(by_size, np.int64)
        """Tokens of these."""
        self.distinct = np.zeros((*by_size, num_layers), np.int64)
        """Distinct experts, summed over steps, ``[num_kinds, num_sizes, num_layers]``."""
        self.busiest = np.zeros((*by_size, num_layers), np.int64)
        """Tokens of a layer's busiest expert, summed in the same way."""
        self.histogram = np.zeros((len(KINDS), len(self._bounds)), np.int64)
        """Layers of steps by distinct experts, ``[num_kinds, num_bounds]``."""

    def add(self, selections: Counts, columns: Sequence[int], top_k: int, is_first: bool) -> None:
        """Add a step of one stage.

        Args:
            selections: Of the step, ``[num_phases, num_layers of the stage, num_experts]``.
            columns: Which layers of the engine those are.
            top_k: Experts a token.
            is_first: Whether it is the first stage that routes: the others have the same tokens.
        """
        prefill, decode = (selections[:, 0].sum(-1) // top_k).tolist()
        kind = KINDS.index("mixed" if prefill and decode else "decode" if decode else "prefill")
        tokens = prefill + decode
        size = int(np.searchsorted(MIN_TOKENS, tokens, side="right")) - 1
        loads = selections.sum(0)
        distinct = np.count_nonzero(loads, axis=-1)
        self.steps[kind, size] += is_first
        self.tokens[kind, size] += tokens * is_first
        self.distinct[kind, size, columns] += distinct
        self.busiest[kind, size, columns] += loads.max(-1)
        bound = np.searchsorted(self._bounds, distinct)
        self.histogram[kind] += np.bincount(bound, minlength=len(self._bounds))

    def since(self, before: StepFigures | None) -> StepFigures:
        """Return what was added since earlier figures; a copy where there were none."""
        made = copy.deepcopy(self)
        if before is not None:
            for name in _SUMS:
                getattr(made, name)[:] -= getattr(before, name)
        return made


class Steps:
    """The figures of all engines, in total and since the last reset.

    Args:
        spec: What the deployment captures.
    """

    def __init__(self, spec: CaptureSpec) -> None:
        self._spec = spec
        self._column = {layer: column for column, layer in enumerate(spec.layers)}
        self._figures: dict[int, StepFigures] = {}
        self._then: dict[int, StepFigures] = {}
        """At the last reset."""
        self._pieces: dict[tuple[int, int], tuple[int, Counts]] = {}
        """By engine and stage: a step's number, and the selections of its pieces so far."""
        self.reset()

    def add(self, worker: CaptureSpec, step: Step, selections: Counts, *, is_first: bool) -> None:
        """Add a step, or a piece of one, of which more may follow.

        Args:
            worker: What its worker captures.
            step: The step.
            selections: As of `StepFigures.add`, of the piece.
            is_first: As of `StepFigures.add`.
        """
        place = worker.engine, worker.stage
        number, before = self._pieces.pop(place, (step.number, None))
        if before is not None and number == step.number:
            selections = selections + before
        if step.has_more:
            self._pieces[place] = step.number, selections
        elif selections.any():
            columns = [self._column[layer] for layer in worker.layers]
            if worker.engine not in self._figures:
                spec = self._spec
                self._figures[worker.engine] = StepFigures(len(spec.layers), spec.num_experts)
            self._figures[worker.engine].add(selections, columns, worker.top_k, is_first)

    def reset(self) -> None:
        """Start `since_reset` anew."""
        self._then = {engine: one.since(None) for engine, one in self._figures.items()}
        self.since_s = time.time()
        """Unix time of the last reset, in seconds."""

    @property
    def totals(self) -> dict[int, StepFigures]:
        """Since the start, by engine, in the engines' order."""
        return dict(sorted(self._figures.items()))

    @property
    def since_reset(self) -> dict[int, StepFigures]:
        """Since the last reset, by engine, in the engines' order."""
        new = {engine: one.since(self._then.get(engine)) for engine, one in self.totals.items()}
        return {engine: one for engine, one in new.items() if one.steps.any()}
