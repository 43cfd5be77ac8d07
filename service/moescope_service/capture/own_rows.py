"""Finds a data-parallel rank's own rows in what a router returns.

Under data parallelism a MoE layer may route the tokens of all ranks at once, or a part of them.
Relies on vLLM 0.32.0, ``forward_context.py`` (``DPMetadata``: ``num_tokens_across_dp_cpu``,
``local_sizes``) and follows ``model_executor/layers/fused_moe/routed_experts_capturer.py``
(``RoutedExpertsCapturer.capture``), which lists the four layouts.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger("moescope.capture")


class OwnRows:
    """Cuts one data-parallel rank's rows out of a layer's routing.

    Token counts include the padding of CUDA graphs, so that what is cut at a graph's capture is
    right in its replays too.

    Args:
        dp_rank: Number of the data-parallel rank.
        tp_size: Tensor-parallel workers a rank.
    """

    def __init__(self, dp_rank: int, tp_size: int) -> None:
        self._dp_rank = dp_rank
        self._tp_size = tp_size
        self._has_warned = False

    def __call__(
        self, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and weights of the own rows, ``[num_tokens, top_k]`` each.

        With sequence parallelism it is a collective of the tensor-parallel group.
        """
        from vllm.distributed.parallel_state import get_tp_group

        span = self.span(len(topk_ids))
        if span is not None:
            return topk_ids[span], topk_weights[span]
        group = get_tp_group()
        return group.all_gather(topk_ids, 0), group.all_gather(topk_weights, 0)

    def span(self, num_rows: int) -> slice | None:
        """Return where the own rows stand among those of one call of a router.

        Args:
            num_rows: Rows that the router was called with.

        Returns:
            Their place; None where each tensor-parallel worker has a part of them. Empty where the
            number of rows fits none of vLLM's layouts: the layer then lacks these rows.
        """
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().dp_metadata
        if metadata is None:
            return slice(0, num_rows)
        try:
            return _span(metadata, num_rows, self._dp_rank, self._tp_size)
        except _UnknownLayoutError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("%s: rows are lost (hook_missed)", error)
            return slice(0, 0)


class _UnknownLayoutError(Exception):
    pass


def _span(metadata: Any, num_rows: int, dp_rank: int, tp_size: int) -> slice | None:
    by_rank = metadata.num_tokens_across_dp_cpu.tolist()
    own = by_rank[dp_rank]
    shards = getattr(metadata, "local_sizes", None)
    if num_rows == sum(by_rank):  # all ranks' tokens, one rank after the other
        start = sum(by_rank[:dp_rank])
        return slice(start, start + own)
    if num_rows == own:  # the ranks exchange tokens behind the router
        return slice(0, own)
    if shards is not None and num_rows == sum(shards):  # sequence-parallel shards of all ranks
        start = sum(shards[: dp_rank * (len(shards) // len(by_rank))])
        return slice(start, start + own)
    if tp_size > 1 and num_rows == -(-own // tp_size):  # a sequence-parallel shard of its own
        return None
    raise _UnknownLayoutError(
        f"a router was called with {num_rows} rows, which is no layout of data-parallel ranks "
        f"that have {by_rank} tokens (shards: {shards}, tensor-parallel size: {tp_size})"
    )
