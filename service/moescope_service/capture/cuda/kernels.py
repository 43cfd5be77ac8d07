"""Triton kernels of the capture on NVIDIA GPUs.

Two move routing and compute nothing: ids are narrowed to the shipped dtype, weights rounded to it.
The third counts ids.

Under ``TRITON_INTERPRET=1`` they run on the CPU, which is how they are tested there.
"""

from __future__ import annotations

import triton
import triton.language as tl

COPY_BLOCK = 1024
"""Entries (token, k) that one program of `copy_routing` copies."""
_PACK_TILE = 1024
"""Entries (row, layer, k) that one program of `pack_rows` moves, at least one row."""


@triton.jit(
    do_not_specialize=["num_tokens", "ids_row", "ids_column", "weights_row", "weights_column"]
)
def copy_routing(
    topk_ids,
    topk_weights,
    to_ids,
    to_weights,
    num_tokens,
    ids_row,
    ids_column,
    weights_row,
    weights_column,
    TOP_K: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy one layer's ids and weights into their static buffers, ``[max_tokens, TOP_K]`` each.

    Args:
        topk_ids: ``[num_tokens, >= TOP_K]``, any integer type; further columns are left out.
        topk_weights: ``[num_tokens, >= TOP_K]``, any floating type.
        to_ids: Contiguous.
        to_weights: Contiguous.
        num_tokens: Rows to copy.
        ids_row: Stride of the ids' rows, in elements; likewise the other three.
        ids_column: …
        weights_row: …
        weights_column: …
        TOP_K: Columns to copy.
        BY_WEIGHT: Whether to sort each row by descending weight; equal ones keep their order.
        BLOCK: Entries a program copies.
    """
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < num_tokens * TOP_K
    row = (entry // TOP_K).to(tl.int64)
    column = entry % TOP_K
    ids = tl.load(topk_ids + row * ids_row + column * ids_column, mask=mask, other=0)
    row_weights = topk_weights + row * weights_row
    weights = tl.load(row_weights + column * weights_column, mask=mask, other=0.0)
    target = entry
    if BY_WEIGHT:
        rank = tl.zeros([BLOCK], tl.int32)
        for other in tl.static_range(TOP_K):
            beside = tl.load(row_weights + other * weights_column, mask=mask, other=0.0)
            is_before = (beside > weights) | ((beside == weights) & (other < column))
            rank += is_before.to(tl.int32)
        target = entry - column + rank
    tl.store(to_ids + target, ids.to(to_ids.dtype.element_ty), mask=mask)
    tl.store(to_weights + target, weights.to(to_weights.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_slot", "num_rows", "layer_stride", "num_experts"])
def pack_rows(
    topk_ids,
    topk_weights,
    positions,
    to_ids,
    to_weights,
    to_positions,
    first_slot,
    num_rows,
    layer_stride,
    num_experts,
    TOP_K: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Turn the layers' buffers into rows, and mark what was read.

    A row whose ids are not all in ``[0, num_experts)`` gets position -1. What was read is
    overwritten with -1, so that a layer that does not write in the next step is noticed.

    Args:
        topk_ids: Static buffer ``[num_layers, max_tokens, TOP_K]``, integer.
        topk_weights: Static buffer of the same shape, float32.
        positions: ``[max_tokens]``, int64.
        to_ids: ``[num_slots, ENTRIES]``, uint8 or uint16.
        to_weights: ``[num_slots, ENTRIES]``, float16 or float32.
        to_positions: ``[num_slots]``, int32.
        first_slot: Where the first row goes.
        num_rows: Rows to pack.
        layer_stride: ``max_tokens * TOP_K``.
        num_experts: Ids are below it.
        TOP_K: Experts a token and layer.
        ENTRIES: ``num_layers * TOP_K``.
        BLOCK_ROWS: Rows a program packs.
        BLOCK_ENTRIES: ``ENTRIES``, rounded up to a power of two.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    entry = tl.arange(0, BLOCK_ENTRIES)[None, :]
    row_mask = row < num_rows
    mask = row_mask[:, None] & (entry < ENTRIES)
    layer = (entry // TOP_K).to(tl.int64)
    source = layer * layer_stride + row[:, None] * TOP_K + entry % TOP_K
    ids = tl.load(topk_ids + source, mask=mask, other=0)
    weights = tl.load(topk_weights + source, mask=mask, other=0.0)
    is_wrong = (ids < 0) | (ids >= num_experts)
    num_wrong = tl.sum(is_wrong.to(tl.int32), axis=1)
    slot = (first_slot + row).to(tl.int64)
    target = slot[:, None] * ENTRIES + entry
    tl.store(to_ids + target, ids.to(to_ids.dtype.element_ty), mask=mask)
    tl.store(to_weights + target, weights.to(to_weights.dtype.element_ty), mask=mask)
    position = tl.load(positions + row, mask=row_mask, other=0)
    position = tl.where(num_wrong == 0, position, -1)
    tl.store(to_positions + slot, position.to(tl.int32), mask=row_mask)
    tl.debug_barrier()  # other threads store than load: all must have loaded
    tl.store(topk_ids + source, tl.full(source.shape, -1, topk_ids.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row", "num_rows", "layer_stride", "num_experts", "phase"])
def count_rows(
    topk_ids,
    counts,
    first_row,
    num_rows,
    layer_stride,
    num_experts,
    phase,
    TOP_K: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Add rows of the layers' buffers to a histogram, and mark what was read.

    A row whose ids are not all in ``[0, num_experts)`` is added only to the number of rows that a
    layer did not write. What was read is overwritten with -1, as by `pack_rows`.

    Args:
        topk_ids: Static buffer ``[num_layers, max_tokens, TOP_K]``, integer.
        counts: Selections ``[2, num_layers, num_experts]``, int64, and behind them the number of
            rows that a layer did not write.
        first_row: First row to count.
        num_rows: Rows to count.
        layer_stride: ``max_tokens * TOP_K``.
        num_experts: Ids are below it.
        phase: 0 or 1: where in ``counts``.
        TOP_K: Experts a token and layer.
        ENTRIES: ``num_layers * TOP_K``.
        BLOCK_ROWS: Rows a program counts.
        BLOCK_ENTRIES: ``ENTRIES``, rounded up to a power of two.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    entry = tl.arange(0, BLOCK_ENTRIES)[None, :]
    row_mask = row < num_rows
    mask = row_mask[:, None] & (entry < ENTRIES)
    layer = (entry // TOP_K).to(tl.int64)
    source = layer * layer_stride + (first_row + row)[:, None] * TOP_K + entry % TOP_K
    ids = tl.load(topk_ids + source, mask=mask, other=0)
    is_wrong = (ids < 0) | (ids >= num_experts)
    num_wrong = tl.sum(is_wrong.to(tl.int32), axis=1)
    num_layers = ENTRIES // TOP_K
    target = (phase * num_layers + layer) * num_experts + ids
    one = tl.full(target.shape, 1, tl.int64)
    # Relaxed: nothing else is ordered by these additions, and an ordered one waits for all before.
    is_counted = mask & (num_wrong == 0)[:, None]
    tl.atomic_add(counts + target, one, mask=is_counted, sem="relaxed")
    behind = tl.full(row.shape, 2 * num_layers, tl.int64) * num_experts
    missed = tl.full(row.shape, 1, tl.int64)
    tl.atomic_add(counts + behind, missed, mask=row_mask & (num_wrong > 0), sem="relaxed")
    tl.debug_barrier()  # other threads store than load: all must have loaded
    tl.store(topk_ids + source, tl.full(source.shape, -1, topk_ids.dtype.element_ty), mask=mask)


def pack_blocks(num_layers: int, top_k: int) -> dict[str, int]:
    """Return the constants of `pack_rows` and `count_rows` for a model."""
    entries = num_layers * top_k
    block_entries = triton.next_power_of_2(entries)
    return {
        "TOP_K": top_k,
        "ENTRIES": entries,
        "BLOCK_ROWS": max(1, _PACK_TILE // block_entries),
        "BLOCK_ENTRIES": block_entries,
    }
