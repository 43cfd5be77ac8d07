"""Routed tokens of one model, as every figure takes them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # a trace knows the figures of its own counts
    from moescope.trace import RouteTrace

PHASES = ("prompt", "output", "unknown")
"""What ``phases`` numbers: whether a row's token is one of the prompt."""
NO_TOKEN = -1
"""The token id of a row whose token is not known."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Routed tokens of any number of requests, none of them missing."""

    num_experts: int
    """Routed experts a layer."""
    topk_ids: npt.NDArray[np.integer]
    """Expert ids, ``[num_rows, num_layers, top_k]``."""
    topk_weights: npt.NDArray[np.floating] | None
    """Their weights, the same shape; None where they are not known."""
    token_ids: npt.NDArray[np.int32]
    """``[num_rows]``; `NO_TOKEN` where it is not known."""
    positions: npt.NDArray[np.integer]
    """Position of the token in its sequence, prompt first, ``[num_rows]``."""
    phases: npt.NDArray[np.uint8]
    """An index into `PHASES`, ``[num_rows]``."""
    requests: npt.NDArray[np.uint64]
    """The `request_number` of each row's request, ``[num_rows]``."""

    def __post_init__(self) -> None:
        """Check that the arrays fit each other.

        Raises:
            ValueError: A shape does not fit.
        """
        if self.topk_ids.ndim != 3:
            raise ValueError(
                f"topk_ids must be [num_rows, num_layers, top_k], got {self.topk_ids.shape}"
            )
        if self.topk_weights is not None and self.topk_weights.shape != self.topk_ids.shape:
            raise ValueError(
                f"topk_weights has shape {self.topk_weights.shape}, topk_ids {self.topk_ids.shape}"
            )
        for name in ("token_ids", "positions", "phases", "requests"):
            if getattr(self, name).shape != (self.num_rows,):
                raise ValueError(
                    f"{name} must be [{self.num_rows}], got {getattr(self, name).shape}"
                )

    @property
    def num_rows(self) -> int:
        """Routed tokens."""
        return int(self.topk_ids.shape[0])

    @property
    def num_layers(self) -> int:
        """Layers."""
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts a token and layer."""
        return int(self.topk_ids.shape[2])

    @functools.cached_property
    def ids_by_layer(self) -> npt.NDArray[np.integer]:
        """The expert ids as ``[num_layers, top_k, num_rows]``, contiguous: a layer is a block."""
        return np.ascontiguousarray(self.topk_ids.transpose(1, 2, 0))

    @functools.cached_property
    def weights_by_layer(self) -> npt.NDArray[np.floating] | None:
        """The weights in the same order."""
        if self.topk_weights is None:
            return None
        return np.ascontiguousarray(self.topk_weights.transpose(1, 2, 0))

    @functools.cached_property
    def request_places(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.intp]]:
        """The different requests, and the place of each row's among them, ``[num_rows]``."""
        requests, places = np.unique(self.requests, return_inverse=True)
        return requests, places.reshape(-1)

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> Rows:
        """Return some rows."""
        weights = self.topk_weights
        return dataclasses.replace(
            self,
            topk_ids=self.topk_ids[rows],
            topk_weights=None if weights is None else weights[rows],
            **{
                name: getattr(self, name)[rows]
                for name in ("token_ids", "positions", "phases", "requests")
            },
        )

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """Return the rows of several; without weights where one has none.

        Args:
            parts: At least one, of the same layers and top-k.
        """
        if len(parts) == 1:
            return parts[0]
        weights = [part.topk_weights for part in parts if part.topk_weights is not None]
        return Rows(
            num_experts=parts[0].num_experts,
            topk_weights=np.concatenate(weights) if len(weights) == len(parts) else None,
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("topk_ids", "token_ids", "positions", "phases", "requests")
            },
        )

    @staticmethod
    def of(trace: RouteTrace, label: str = "") -> Rows:
        """Return the rows of a trace, or of a page of one, that are not missing.

        Args:
            trace: The trace.
            label: What `request_number` takes, where ids of several servers come together.
        """
        present = trace.present
        positions = np.arange(trace.start, trace.start + trace.num_rows)[present]
        tokens = np.full(trace.num_rows, NO_TOKEN, np.int32)
        if trace.token_ids is not None:
            tokens = trace.token_ids[: trace.num_rows]
        number = request_number(trace.request_id, label)
        return Rows(
            num_experts=trace.num_experts,
            topk_ids=trace.topk_ids[present],
            topk_weights=None if trace.topk_weights is None else trace.topk_weights[present],
            token_ids=tokens[present],
            positions=positions,
            phases=(positions >= trace.prompt_len).astype(np.uint8),
            requests=np.full(len(positions), number, np.uint64),
        )


def request_number(request_id: str, label: str = "") -> int:
    """Return 64 bits that stand for a request: BLAKE2b of its id.

    Choices of one request share it: they have a prompt in common, and are no independent draws.
    Whatever is chosen by request (its half, its weights in the bootstrap) follows from it, so that
    nothing depends on the order in which rows come.

    Args:
        request_id: The request's id.
        label: Where the request is from, if ids of several servers come together.
    """
    text = f"{label}\0{request_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
