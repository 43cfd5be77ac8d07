"""The routing of one sequence: which experts, with which weights, in which layer."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope import analysis
from moescope.errors import LayerNotCapturedError


class Source(enum.IntEnum):
    """Where a row of a trace comes from. ``source`` alone says that a row is missing."""

    COMPUTED = 0
    """The router computed it for this sequence."""
    CACHED = 1
    """Computed when the KV block that a prefix-cache hit reused was filled."""
    MISSING = 2
    """Not captured; the expert ids and weights of the row mean nothing."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RouteTrace:
    """The routing of one sequence (one choice of one request).

    Row ``i`` is the routing of the token at position ``i``, prompt first. A finished sequence has
    ``num_tokens - 1`` rows: its last sampled token is never routed. Expert ids are logical (before
    any expert-parallel load balancing), layers are the model's own layer numbers.
    """

    request_id: str
    """An id of the request as its client saw it, such as ``chatcmpl-…``."""
    index: int
    """The choice's index in the response: prompt number x n + sample number."""
    model: str
    """The served model's name."""
    lora: str | None = None
    """The name of the LoRA adapter, if any."""
    num_experts: int
    """Routed experts a layer."""
    num_hidden_layers: int
    """Layers of the model, those without experts included."""
    layers: npt.NDArray[np.int32]
    """Global layer numbers, ``[num_layers]``."""
    topk_ids: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    """Expert ids, ``[num_rows, num_layers, top_k]``, in the router's order."""
    topk_weights: npt.NDArray[np.float16] | npt.NDArray[np.float32] | None
    """The weights the router returned, ``[num_rows, num_layers, top_k]``; None if left out."""
    source: npt.NDArray[np.uint8]
    """A `Source` for every row, ``[num_rows]``."""
    token_ids: npt.NDArray[np.int32] | None
    """Prompt and output tokens, ``[num_tokens]``; None where the server keeps them out."""
    prompt_len: int
    """Prompt tokens."""
    num_tokens: int
    """Prompt and output tokens."""
    cached_len: int
    """Prompt tokens found in the prefix cache when the sequence was first scheduled."""
    finish_reason: str | None
    """``stop``, ``length``, ``abort`` … as the engine gave it."""
    complete: bool
    """Every expected sender reported the end, nothing was lost on the way, no row is missing."""
    created_s: float
    """Unix time at which the request was registered, in seconds."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of moescope, vLLM and torch on the server."""

    def __post_init__(self) -> None:
        """Check that the arrays fit each other.

        Raises:
            ValueError: An array's shape does not fit the others.
        """
        if self.topk_ids.ndim != 3 or self.topk_ids.shape[1] != len(self.layers):
            raise ValueError(
                f"topk_ids must be [num_rows, {len(self.layers)}, top_k], "
                f"got shape {self.topk_ids.shape}"
            )
        if self.topk_weights is not None and self.topk_weights.shape != self.topk_ids.shape:
            raise ValueError(
                f"topk_weights has shape {self.topk_weights.shape}, "
                f"topk_ids {self.topk_ids.shape}: they must be equal"
            )
        if self.source.shape != (self.num_rows,):
            raise ValueError(f"source must be [{self.num_rows}], got shape {self.source.shape}")
        if self.token_ids is not None and self.token_ids.shape != (self.num_tokens,):
            raise ValueError(
                f"token_ids must be [{self.num_tokens}], got shape {self.token_ids.shape}"
            )

    @property
    def num_rows(self) -> int:
        """Rows of the trace: ``num_tokens - 1``."""
        return int(self.topk_ids.shape[0])

    @property
    def num_layers(self) -> int:
        """Captured layers."""
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts a token and layer."""
        return int(self.topk_ids.shape[2])

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """Which rows are not missing, ``[num_rows]``."""
        present: npt.NDArray[np.bool_] = self.source != Source.MISSING
        return present

    @property
    def coverage(self) -> float:
        """Share of rows that are not missing, in [0, 1]; 1.0 for a trace without rows."""
        return float(self.present.mean()) if self.num_rows else 1.0

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.layers, self.topk_ids, self.topk_weights, self.source, self.token_ids)
        return sum(array.nbytes for array in arrays if array is not None)

    def counts(self) -> npt.NDArray[np.int64]:
        """Count how often each expert was selected in the rows that are not missing.

        Returns:
            Selections, ``[num_layers, num_experts]``.
        """
        ids = self.topk_ids[self.present].astype(np.int64)
        offsets = np.arange(self.num_layers)[None, :, None] * self.num_experts
        flat = np.bincount((ids + offsets).ravel(), minlength=self.num_layers * self.num_experts)
        return flat.reshape(self.num_layers, self.num_experts)

    def entropy(self) -> npt.NDArray[np.float64]:
        """Return the Shannon entropy of the selections in nats, ``[num_layers]``.

        The functions of `moescope.analysis` say more about ``counts()``.
        """
        return analysis.entropy(self.counts())

    def top_experts(self, k: int = 3) -> dict[int, list[tuple[int, int, float]]]:
        """Return the k busiest experts of each layer.

        Returns:
            For each layer number (expert, selections, share), busiest first.
        """
        return {
            layer: analysis.top_experts(counts, k)
            for layer, counts in zip(self.layers.tolist(), self.counts(), strict=True)
        }

    def select(self, *, layers: Sequence[int] | None = None, weights: bool = True) -> RouteTrace:
        """Keep some layers only, or leave the weights out.

        Args:
            layers: Global layer numbers to keep, in this order; all where None.
            weights: Whether to keep ``topk_weights``.

        Raises:
            LayerNotCapturedError: A layer is not part of the trace.
        """
        changes: dict[str, Any] = {}
        if layers is not None:
            captured = self.layers.tolist()
            unknown = [layer for layer in layers if layer not in captured]
            if unknown:
                raise LayerNotCapturedError(unknown, captured)
            columns = [captured.index(layer) for layer in layers]
            changes["layers"] = self.layers[columns]
            changes["topk_ids"] = self.topk_ids[:, columns]
            if self.topk_weights is not None:
                changes["topk_weights"] = self.topk_weights[:, columns]
        if not weights:
            changes["topk_weights"] = None
        return dataclasses.replace(self, **changes)
