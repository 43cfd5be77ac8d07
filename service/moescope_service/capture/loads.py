"""Tells workers which KV-cache blocks a KV connector fills: no router sees their tokens.

A worker is told how many tokens of a sequence are computed, not who computed them, and nothing of
blocks that are allocated for a load of a sequence that does not run yet, or never will. Such blocks
can be hit like others. So the engine core's scheduler notes them when they are allocated, and sends
the notes with its next output: whatever rows stood in them are forgotten before anyone can hit
them. Its notes also say which prefix a block holds, so that the collector knows rows again whose KV
entries come back.

Relies on vLLM 0.32.0, ``v1/core/sched/scheduler.py`` (``Scheduler``: everything is allocated within
``schedule``, whose outputs reach the workers in order, those without tokens too),
``v1/core/kv_cache_manager.py`` (``KVCacheManager.allocate_slots``: external tokens are those of the
connector, and follow those that were computed here) and ``v1/core/block_pool.py``
(``BlockPool.cache_full_blocks``: called in the step that computes a block's last token, which is no
draft, or after its load).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from moescope_service.capture.kv_cache import full_attention_group
from moescope_service.settings import Settings
from moescope_service.vllm_contract.patching import followed_by, wrap_once

_NOTES = "moescope_notes"
"""Attribute of a ``SchedulerOutput``, a plain dataclass that is pickled as a whole."""
_KEY_BYTES = 16
"""Of vLLM's hash of a prefix."""


class Notes(NamedTuple):
    """What became of blocks since the scheduler's output before: (block, key of its prefix)."""

    loaded: list[tuple[int, str]]
    """Allocated for a load; the key is empty where the load ends within the block."""
    filled: list[tuple[int, str]]
    """Full when this step has run; allocated before, or in this step."""


_NOTHING = Notes([], [])


def install(scheduler_class: Any) -> None:
    """Let schedulers that have a connector take notes; a second call does nothing."""
    wrap_once(scheduler_class, "__init__", followed_by(_follow))


def are_told(config: Any) -> bool:
    """Whether workers are told of every block that a connector fills.

    Args:
        config: A ``VllmConfig``.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    if config.kv_transfer_config is None:
        return True
    return issubclass(config.scheduler_config.get_scheduler_cls(), Scheduler)


def read_notes(scheduler_output: Any) -> Notes:
    """Return the notes that came with a scheduler's output."""
    return getattr(scheduler_output, _NOTES, _NOTHING)


def _follow(scheduler: Any, *_: Any, **__: Any) -> None:
    if scheduler.connector is None:
        return
    manager = scheduler.kv_cache_manager
    taker = _NoteTaker(manager)
    wrap_once(manager, "allocate_slots", taker.of_loads)
    if Settings.from_env().prefix_bytes:
        wrap_once(manager.block_pool, "cache_full_blocks", taker.of_prefixes)
    wrap_once(scheduler, "schedule", taker.sent)


class _NoteTaker:
    """Follows the blocks of one KV-cache manager.

    Args:
        manager: A ``KVCacheManager``.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._group, self._block_size = full_attention_group(manager.kv_cache_config)
        self._loaded: list[tuple[int, str]] = []
        self._filled: list[tuple[int, str]] = []

    def of_loads(self, allocate_slots: Callable[..., Any]) -> Callable[..., Any]:
        """Make a wrapper of ``KVCacheManager.allocate_slots``."""

        def allocate_and_note(
            request: Any,
            num_new_tokens: int,
            num_new_computed_tokens: int = 0,
            *args: Any,
            num_external_computed_tokens: int = 0,
            **kwargs: Any,
        ) -> Any:
            start = request.num_computed_tokens + num_new_computed_tokens
            blocks = allocate_slots(
                request,
                num_new_tokens,
                num_new_computed_tokens,
                *args,
                num_external_computed_tokens=num_external_computed_tokens,
                **kwargs,
            )
            if blocks is not None and num_external_computed_tokens:
                self._note_load(request, start, start + num_external_computed_tokens)
            return blocks

        return allocate_and_note

    def _note_load(self, request: Any, start: int, end: int) -> None:
        from vllm.v1.core.kv_cache_utils import resolve_block_hashes

        size, pool = self._block_size, self._manager.block_pool
        table = self._manager.get_block_ids(request.request_id)[self._group]
        hashes = resolve_block_hashes(request.block_hashes, pool.hash_block_size, size)
        for number in range(start // size, -(-end // size)):
            is_full = (number + 1) * size <= end and number < len(hashes)
            self._loaded.append((table[number], _key(hashes[number]) if is_full else ""))

    def of_prefixes(self, cache_full_blocks: Callable[..., Any]) -> Callable[..., Any]:
        """Make a wrapper of ``BlockPool.cache_full_blocks``."""
        from vllm.v1.core.kv_cache_utils import get_block_hash

        def cache_and_note(
            *,
            blocks: Any,
            num_cached_blocks: int,
            num_full_blocks: int,
            kv_cache_group_id: int,
            **kwargs: Any,
        ) -> None:
            cache_full_blocks(
                blocks=blocks,
                num_cached_blocks=num_cached_blocks,
                num_full_blocks=num_full_blocks,
                kv_cache_group_id=kv_cache_group_id,
                **kwargs,
            )
            if kv_cache_group_id == self._group:
                self._filled += [
                    (block.block_id, _key(get_block_hash(block.block_hash)))
                    for block in blocks[num_cached_blocks:num_full_blocks]
                    if block.block_hash is not None
                ]

        return cache_and_note

    def sent(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """Make a wrapper of ``Scheduler.schedule``."""

        def schedule_and_send(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if self._loaded or self._filled:
                setattr(output, _NOTES, Notes(self._loaded, self._filled))
                self._loaded, self._filled = [], []
            return output

        return schedule_and_send


def _key(block_hash: bytes) -> str:
    return block_hash[:_KEY_BYTES].hex()
