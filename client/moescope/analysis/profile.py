"""Every figure of a model's routes at once, from rows as they come."""

from __future__ import annotations

import functools
import operator
from typing import Self

from moescope.analysis import vocabulary
from moescope.analysis.bootstrap import LoadReplicates
from moescope.analysis.effective import EffectiveExperts
from moescope.analysis.loads import Loads
from moescope.analysis.pairs import CoActivation, Transitions
from moescope.analysis.prediction import RowSample
from moescope.analysis.rows import Rows
from moescope.analysis.vocabulary import Vocabulary


class Profile:
    """The counts behind every figure; adds up.

    Attributes:
        num_layers: Layers.
        num_experts: Experts a layer.
        top_k: Experts a token.
        loads: By the label of the rows.
        replicates: The bootstrap of the same.
        requests: Numbers of the requests of each label.
        co_activation: Pairs within a layer.
        transitions: Pairs from a layer to the next one.
        sample: Rows to predict.
        vocabulary: Selections by token id.
        effective: Effective numbers of experts.

    Args:
        num_layers: Layers.
        num_experts: Experts a layer.
        top_k: Experts a token.
        vocabulary_bytes: As `Vocabulary` takes it.
        seed: That of the bootstrap.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        top_k: int,
        *,
        vocabulary_bytes: int = vocabulary.MAX_BYTES,
        seed: int = 0,
    ) -> None:
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.seed = seed
        self.loads: dict[str, Loads] = {}
        self.replicates: dict[str, LoadReplicates] = {}
        self.requests: dict[str, set[int]] = {}
        self.co_activation = CoActivation(num_layers, num_experts)
        self.transitions = Transitions(num_layers, num_experts)
        self.sample = RowSample()
        self.vocabulary = Vocabulary(num_layers, num_experts, max_bytes=vocabulary_bytes)
        self.effective = EffectiveExperts(num_layers, top_k)
        self._vocabulary_bytes = vocabulary_bytes

    def add(self, rows: Rows, label: str = "") -> None:
        """Take rows.

        Args:
            rows: Rows.
            label: Their domain.

        Raises:
            ValueError: They are of another shape.
        """
        shape = (rows.num_layers, rows.num_experts, rows.top_k)
        if shape != (self.num_layers, self.num_experts, self.top_k):
            raise ValueError(
                f"rows are of {shape[0]} layers, {shape[1]} experts and top-{shape[2]}, the others "
                f"of {self.num_layers}, {self.num_experts} and top-{self.top_k}"
            )
        if label not in self.loads:
            self.loads[label] = Loads(self.num_layers, self.num_experts)
            self.replicates[label] = LoadReplicates(
                self.num_layers, self.num_experts, seed=self.seed
            )
            self.requests[label] = set()
        self.requests[label].update(rows.request_places[0].tolist())
        parts = (self.co_activation, self.transitions, self.sample, self.vocabulary, self.effective)
        for part in (self.loads[label], self.replicates[label], *parts):
            part.add(rows)

    def __add__(self, other: Self) -> Self:
        """Return both together.

        Raises:
            ValueError: They are of another shape, or seed.
        """
        mine = (self.num_layers, self.num_experts, self.top_k, self.seed)
        if mine != (other.num_layers, other.num_experts, other.top_k, other.seed):
            raise ValueError("profiles of different models, or seeds, do not add up")
        result = type(self)(*mine[:3], seed=self.seed, vocabulary_bytes=self._vocabulary_bytes)
        for name in ("loads", "replicates"):
            both, theirs = dict(getattr(self, name)), getattr(other, name)
            both |= {key: both[key] + one if key in both else one for key, one in theirs.items()}
            setattr(result, name, both)
        labels = {*self.requests, *other.requests}
        result.requests = {
            one: self.requests.get(one, set()) | other.requests.get(one, set()) for one in labels
        }
        for name in ("co_activation", "transitions", "sample", "vocabulary", "effective"):
            setattr(result, name, getattr(self, name) + getattr(other, name))
        return result

    @property
    def labels(self) -> list[str]:
        """The labels of rows that were taken, sorted."""
        return sorted(self.loads)

    @property
    def load(self) -> Loads:
        """The loads of all labels together."""
        nothing = Loads(self.num_layers, self.num_experts)
        return functools.reduce(operator.add, self.loads.values(), nothing)

    @property
    def replicate(self) -> LoadReplicates:
        """The bootstrap of all labels together."""
        nothing = LoadReplicates(self.num_layers, self.num_experts, seed=self.seed)
        return functools.reduce(operator.add, self.replicates.values(), nothing)

    @property
    def num_requests(self) -> int:
        """Requests of all labels."""
        return sum(map(len, self.requests.values()))
