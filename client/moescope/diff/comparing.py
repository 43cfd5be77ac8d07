"""Compares the rows of two sides that have the same tokens before them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from moescope.analysis import Differences
from moescope.diff.pairing import NEVER, Pairs, pair
from moescope.diff.side import Side
from moescope.errors import CommandError

_BATCHES = 4
"""A comparison holds so many times what a figure of `analyze` does."""


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Comparison:
    """What was found of two sides."""

    pairs: Pairs
    differences: Differences
    num_after: int
    """Rows of the first side from the texts' divergence on: they have other inputs."""
    num_alone: tuple[int, int]
    """Rows before it that the other side has not, of each side."""
    first: npt.NDArray[np.int64]
    """The first row and layer with other experts, ``[num_pairs, 2]``; (`NEVER`, -1) where none."""
    first_beyond: npt.NDArray[np.int64]
    """The same, near-ties left out."""

    @property
    def num_rows(self) -> int:
        """Rows that were compared."""
        return self.differences.num_rows


def _check_fit(a: Side, b: Side) -> None:
    """Check that sides have the same layers, experts and top-k; their models' names may differ."""
    for what, values in (
        ("layers", [list(one.model.layers) for one in (a, b)]),
        ("experts a layer", [one.model.num_experts for one in (a, b)]),
        ("experts a token", [one.model.top_k for one in (a, b)]),
    ):
        if values[0] != values[1]:
            raise CommandError(
                f"{a.name} and {b.name} cannot be compared: {what} are {values[0]} and "
                f"{values[1]}; diff compares servers of one architecture"
            )


def compare(
    a: Side, b: Side, *, near_tie: float, seed: int, tell: Callable[[float], None]
) -> Comparison:
    """Compare the rows of two sides.

    Args:
        a: The first side; requests are resampled by its ids.
        b: The second side, of the same layers, experts and top-k.
        near_tie: As `Differences` takes it.
        seed: That of the bootstrap.
        tell: Is told which part is done, 0 to 1.

    Raises:
        CommandError: They are of two architectures, or have no request or row in common.
    """
    _check_fit(a, b)
    pairs = pair(a.sequences, b.sequences)
    if not len(pairs):
        raise CommandError(
            f"{a.name} and {b.name} have no request in common: they are paired by request id, or "
            "by the token ids of the prompt, which run directories of `moescope replay`, .npz, "
            ".arrow and .parquet have and a bare route log has not"
        )
    pair_of, is_before = _where(a, pairs.a, pairs.divergence)
    rows = np.flatnonzero(is_before)
    found = b.find(pairs.b[pair_of[rows]], a.position[rows])
    rows, found = rows[found >= 0], found[found >= 0]
    if not len(rows):
        raise CommandError(
            f"{a.name} and {b.name} have {len(pairs):,} sequences in common, and no row with the "
            "same tokens before it: the texts differ from the first tokens on, or rows are missing"
        )
    differences = Differences(
        len(a.model.layers), a.model.num_experts, near_tie=near_tie, seed=seed
    )
    first, first_beyond = _First(len(pairs), a.model.layers), _First(len(pairs), a.model.layers)
    step = max(1, a.model.batch_rows // _BATCHES)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        differing = differences.add(a.rows(some), b.rows(found[start : start + step]))
        places = (pair_of[some], a.position[some])
        first.add(*places, differing.sets)
        first_beyond.add(*places, differing.sets & ~differing.near_ties)
        tell((start + len(some)) / len(rows))
    return Comparison(
        pairs=pairs,
        differences=differences,
        num_after=int(((pair_of >= 0) & ~is_before).sum()),
        num_alone=(
            int(is_before.sum()) - len(rows),
            int(_where(b, pairs.b, pairs.divergence)[1].sum()) - len(rows),
        ),
        first=first.found,
        first_beyond=first_beyond.found,
    )


def _where(
    side: Side, places: npt.NDArray[np.int64], divergence: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the pair of each row, -1 where it has none, and whether the texts are equal so far."""
    pair_of_sequence = np.full(len(side.sequences), -1, np.int64)
    pair_of_sequence[places] = np.arange(len(places))
    pair_of = pair_of_sequence[side.sequence]
    return pair_of, (pair_of >= 0) & (side.position < divergence[pair_of])


class _First:
    """Keeps the first row and layer of each pair that a mask names, of rows in any order."""

    def __init__(self, num_pairs: int, layers: tuple[int, ...]) -> None:
        self._layers = np.array(layers, np.int64)
        self._lowest = np.full(num_pairs, NEVER * len(layers), np.int64)

    def add(
        self,
        pairs: npt.NDArray[np.int64],
        positions: npt.NDArray[np.integer],
        mask: npt.NDArray[np.bool_],
    ) -> None:
        """Take rows: the pair and position of each, and the mask ``[num_rows, num_layers]``."""
        rows = np.flatnonzero(mask.any(axis=1))
        places = positions[rows].astype(np.int64) * len(self._layers) + mask[rows].argmax(axis=1)
        np.minimum.at(self._lowest, pairs[rows], places)

    @property
    def found(self) -> npt.NDArray[np.int64]:
        """Position and global layer number, ``[num_pairs, 2]``."""
        position, column = np.divmod(self._lowest, len(self._layers))
        return np.stack((position, np.where(position < NEVER, self._layers[column], -1)), axis=1)
