"""Which experts a token id goes to, and which experts are for the same token ids."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np
import numpy.typing as npt

from moescope.analysis.balance import shares
from moescope.analysis.rows import NO_TOKEN, Rows

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
MAX_BYTES = 256 * 2**20
"""Bytes that the counts of a `Vocabulary` take at most, where nothing else is said."""
_MAX_TOKENS = 2**18  # more than vocabularies have
MIN_OCCURRENCES = 10
"""A token id that occurs less often tells little of where it goes. OLMoE lists those of 10 too."""


class Vocabulary:
    """Counts the selections of each token id by layer and expert; adds up.

    Memory is bounded: of more token ids than fit, the lowest are counted, which are the most
    frequent ones of vocabularies made by merges (BPE). Counts are exact, however rows are split.

    Attributes:
        num_rows: Rows whose token id is known.

    Args:
        num_layers: Layers.
        num_experts: Experts a layer.
        max_bytes: Bytes that the counts take at most.
    """

    def __init__(self, num_layers: int, num_experts: int, *, max_bytes: int = MAX_BYTES) -> None:
        fitting = max_bytes // max(1, num_layers * num_experts * 8)
        capacity = min(max(1, fitting), _MAX_TOKENS)
        self._max_bytes = max_bytes
        self._tokens = np.empty(0, np.int32)  # ascending, and where each one's counts are
        self._slots = np.empty(0, np.int64)
        # Of what is never touched the system gives no memory.
        self._counts: Counts = np.zeros((num_layers, capacity, num_experts), np.int64)
        self.num_rows = 0

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """The token ids that are counted, ascending, ``[num_tokens]``."""
        return self._tokens

    def counts(self, layer: int) -> Counts:
        """Return the selections of a layer, ``[num_tokens, num_experts]``."""
        result: Counts = self._counts[layer, self._slots]
        return result

    def add(self, rows: Rows) -> None:
        """Count rows; those without a token id are passed over."""
        is_known = rows.token_ids != NO_TOKEN
        if not is_known.all():
            rows = rows[is_known]
        self._make_room(np.unique(rows.token_ids))
        place = np.searchsorted(self._tokens, rows.token_ids)
        is_counted = place < len(self._tokens)
        is_counted[is_counted] = self._tokens[place[is_counted]] == rows.token_ids[is_counted]
        self.num_rows += rows.num_rows
        used, place = np.unique(self._slots[place[is_counted]], return_inverse=True)
        num_experts = self._counts.shape[2]
        offset = place.reshape(-1) * num_experts
        is_all = bool(is_counted.all())
        for layer, every in enumerate(rows.ids_by_layer):
            ids = every if is_all else every[:, is_counted]
            found = np.bincount((ids + offset).ravel(), minlength=len(used) * num_experts)
            self._counts[layer, used] += found.reshape(len(used), num_experts)

    def _make_room(self, tokens: npt.NDArray[np.int32]) -> None:
        """Give the lowest token ids of those counted and these a place each."""
        capacity = self._counts.shape[1]
        wanted = np.union1d(self._tokens, tokens)[:capacity]
        if np.array_equal(wanted, self._tokens):
            return
        is_new = ~np.isin(wanted, self._tokens)
        stays = np.isin(self._tokens, wanted)
        self._counts[:, self._slots[~stays]] = 0
        is_free = np.ones(capacity, np.bool_)
        is_free[self._slots[stays]] = False
        free = np.flatnonzero(is_free)
        slots = np.empty(len(wanted), np.int64)
        slots[~is_new] = self._slots[stays]
        slots[is_new] = free[: int(is_new.sum())]
        self._tokens, self._slots = wanted.astype(np.int32), slots

    def __add__(self, other: Self) -> Self:
        """Return both together."""
        num_layers, _, num_experts = self._counts.shape
        result = type(self)(num_layers, num_experts, max_bytes=self._max_bytes)
        for one in (self, other):
            result._make_room(one._tokens)
        for one in (self, other):
            shared = np.isin(one._tokens, result._tokens)
            place = np.searchsorted(result._tokens, one._tokens[shared])
            result._counts[:, result._slots[place]] += one._counts[:, one._slots[shared]]
        result.num_rows = self.num_rows + other.num_rows
        return result


def vocabulary_specialization(counts: npt.NDArray[np.integer]) -> Floats:
    """Return the share of a token id's selections that go to each expert: ``N_(x,e) / N_x``.

    ``N_x`` are the selections of all experts: a token id that goes to the same k experts whenever
    it occurs has ``1 / k`` with each of them. Times k it is the share of its occurrences.

    Args:
        counts: Selections, ``[..., num_tokens, num_experts]``, as of `Vocabulary.counts`.

    Source: OLMoE (arXiv 2409.02060), section 5.4.
    """
    return shares(counts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpecializedToken:
    """A token id and the expert that it goes to most."""

    token_id: int
    expert: int
    share: float
    """Of the token's occurrences, those that go to the expert, 0 to 1."""
    occurrences: int


def most_specialized(
    tokens: npt.NDArray[np.int32],
    counts: npt.NDArray[np.integer],
    top_k: int,
    num: int = 20,
    min_occurrences: int = MIN_OCCURRENCES,
) -> list[SpecializedToken]:
    """Return the token ids that go to one expert most of the times that they occur.

    Args:
        tokens: Token ids, ``[num_tokens]``.
        counts: Their selections in a layer, ``[num_tokens, num_experts]``.
        top_k: Experts a token.
        num: How many at most.
        min_occurrences: A token id that occurs less often is left out.

    Returns:
        The highest shares first; of equal ones the more frequent, then the lower id.
    """
    occurrences = counts.sum(axis=1) // top_k
    highest = counts.max(axis=1, initial=0)
    enough = np.flatnonzero(occurrences >= min_occurrences)
    share = highest[enough] / occurrences[enough]
    order = enough[np.lexsort((tokens[enough], -occurrences[enough], -share))]
    return [
        SpecializedToken(
            token_id=int(tokens[one]),
            expert=int(counts[one].argmax()),
            share=float(highest[one] / occurrences[one]),
            occurrences=int(occurrences[one]),
        )
        for one in order[:num]
    ]


def mean_specialization(
    counts: npt.NDArray[np.integer], top_k: int, min_occurrences: int = MIN_OCCURRENCES
) -> float:
    """Return the mean over token ids of the share of their occurrences that one expert has.

    Each token id counts once, with its own most frequent expert. NaN where none occurs often
    enough. OLMoE averages over all token ids; one that occurs once has 1.0 there.

    Args:
        counts: Selections in a layer, ``[num_tokens, num_experts]``.
        top_k: Experts a token.
        min_occurrences: A token id that occurs less often is left out.
    """
    frequent, occurrences = _frequent(counts, top_k, min_occurrences)
    if not len(occurrences):
        return float("nan")
    return float((frequent.max(axis=1) / occurrences).mean())


def expert_similarity(
    counts: npt.NDArray[np.integer], top_k: int, min_occurrences: int = MIN_OCCURRENCES
) -> Floats:
    """Return how alike the token ids of two experts are, ``[num_experts, num_experts]``, -1 to 1.

    The cosine of their vectors over token ids: the share of the id's occurrences that go to the
    expert, less the mean of that over ids. 1 is the same ids, 0 unrelated, below 0 other ids. NaN
    for an expert that takes all ids alike. Not the Jaccard index of the sets of ids: every frequent
    id reaches each busy expert once. Unlike co-activation it finds experts that do the same work
    for different tokens.

    Args:
        counts: Selections in a layer, ``[num_tokens, num_experts]``.
        top_k: Experts a token.
        min_occurrences: A token id that occurs less often is left out.
    """
    frequent, occurrences = _frequent(counts, top_k, min_occurrences)
    share = frequent / occurrences[:, None]
    centered = share - (share.mean(axis=0) if len(share) else 0.0)
    products = centered.T @ centered
    norms = np.sqrt(np.diag(products))
    norms = np.where(norms > 1e-9, norms, np.nan)
    result: Floats = np.clip(products / norms / norms[:, None], -1, 1)
    return result


def _frequent(
    counts: npt.NDArray[np.integer], top_k: int, min_occurrences: int
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Return the counts of token ids that occur often enough, and how often each does."""
    occurrences = counts.sum(axis=1) // top_k
    enough = occurrences >= min_occurrences
    return counts[enough], occurrences[enough]
