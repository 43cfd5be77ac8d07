"""Finds the KV-cache blocks by which a sequence's rows are kept.

Relies on vLLM 0.32.0, ``v1/kv_cache_interface.py`` (``KVCacheConfig.kv_cache_groups`` and the
classes of specs that are named below).
"""

from __future__ import annotations

from typing import Any

from moescope_service.errors import RefusedError


def full_attention_group(kv_cache_config: Any) -> tuple[int, int]:
    """Return the KV-cache group whose blocks hold every token of a sequence.

    Args:
        kv_cache_config: vLLM's ``KVCacheConfig``.

    Returns:
        The group's number and its tokens a block.

    Raises:
        RefusedError: No layer of the model attends to the whole sequence.
    """
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        MLAAttentionSpec,
        SinkFullAttentionSpec,
        UniformTypeKVCacheSpecs,
    )

    # Not their other subclasses: some of those give blocks back while a sequence runs.
    whole = {FullAttentionSpec, MLAAttentionSpec, SinkFullAttentionSpec}
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        first = spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec
        if type(first) in whole:
            return number, int(spec.block_size)
    raise RefusedError(
        "no layer of the model attends to the whole sequence; moescope keeps a running sequence's "
        "rows by its full-attention KV blocks"
    )
