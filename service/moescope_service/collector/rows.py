"""What the collector knows of a sequence's rows, and why it lacks some of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope.trace import Source
from moescope_service.causes import MISSING_CAUSES
from moescope_service.collector.arena import EMPTY, FILLED
from moescope_service.messages import CaptureSpec

CAUSES = {"not_captured": EMPTY} | {
    cause: FILLED + number for number, cause in enumerate(MISSING_CAUSES[1:], start=1)
}
"""How the arena and `Rows.cause` write why a row is missing; `MISSING_CAUSES` says what each means.
An empty slot is one whose row no worker ever shipped."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """What one worker knows of a sequence, in its layers.

    Of one that ended, the rows of positions ``0 … n - 1``.
    """

    layers: list[int]
    topk_ids: npt.NDArray[Any]
    topk_weights: npt.NDArray[Any]
    source: npt.NDArray[np.uint8]
    cause: npt.NDArray[np.uint8]
    """Why each row is missing, one of `CAUSES`' numbers, or `FILLED`, ``[num_rows]``."""
    cached_len: int
    weights_version: npt.NDArray[np.int32]
    """Which weights computed each row, ``[num_rows]``: how often the engine's had changed, or
    `moescope.version_runs.MIXED`; of a missing row it means nothing."""
    cause_beyond: int = CAUSES["unknown"]
    """Why rows behind these are missing, one of `CAUSES`' numbers."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.topk_ids, self.topk_weights, self.source, self.cause)
        return sum(array.nbytes for array in arrays) + self.weights_version.nbytes

    @classmethod
    def nothing(cls, spec: CaptureSpec, cause_beyond: int = CAUSES["unknown"]) -> Rows:
        """Return the rows of a sequence of which nothing is known."""
        shape = (0, len(spec.layers), spec.top_k)
        ids, weights = np.zeros(shape, spec.id_dtype), np.zeros(shape, spec.weights_dtype)
        none = np.zeros(0, np.uint8)
        versions = np.zeros(0, np.int32)
        return cls(spec.layers, ids, weights, none, none, 0, versions, cause_beyond)

    def resized(self, num_rows: int) -> Rows:
        """Cut surplus rows, or add missing ones, so that there are ``num_rows``."""
        num_missing = num_rows - len(self.source)
        if num_missing <= 0:
            kept = slice(num_rows)
            return dataclasses.replace(
                self,
                topk_ids=self.topk_ids[kept],
                topk_weights=self.topk_weights[kept],
                source=self.source[kept],
                cause=self.cause[kept],
                weights_version=self.weights_version[kept],
            )
        pad = [(0, num_missing), (0, 0), (0, 0)]
        return dataclasses.replace(
            self,
            topk_ids=np.pad(self.topk_ids, pad),
            topk_weights=np.pad(self.topk_weights, pad),
            source=np.pad(self.source, (0, num_missing), constant_values=Source.MISSING),
            cause=np.pad(self.cause, (0, num_missing), constant_values=self.cause_beyond),
            weights_version=np.pad(self.weights_version, (0, num_missing)),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """The rows that one step routed, for the counters."""

    topk_ids: npt.NDArray[Any]
    """``[num_rows, num_layers, top_k]``."""
    is_decode: npt.NDArray[np.bool_]
    """Whether each row's token was generated rather than part of the prompt, ``[num_rows]``."""
