"""A small engine with a paged, prefix-caching KV cache that knows every route.

It schedules as vLLM's V1 scheduler does: running sequences first, in chunks, preempting the last
one where blocks run out; then waiting ones, new and preempted ones in one queue, which hit blocks
that others filled or are about to fill in this very step; full blocks are cached when they are
scheduled, partly matching ones are copied. A connector fills blocks from elsewhere, in the step
itself or while the sequence waits. What a row holds is a function of its token prefix.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.simulation.kv import KvCache, Seq
from moescope_service.messages import CaptureSpec

VOCABULARY = 3
MAX_DRAFTS = 3


def truth(hashes: list[int], spec: CaptureSpec, version: Any = 0) -> tuple[Any, Any]:
    """The rows of positions whose prefixes have these hashes: (ids, weights).

    Args:
        hashes: One a row.
        spec: Their shape.
        version: Of the model's weights, of all rows or of each: rows of another one are others.
    """
    shape = (len(hashes), len(spec.layers), spec.top_k)
    salts = np.asarray(version, np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    values = (np.array(hashes, np.uint64) ^ salts)[:, None]
    shifts = np.arange(shape[1] * shape[2], dtype=np.uint64)[None, :] * np.uint64(7)
    ids = (values >> shifts) % np.uint64(spec.num_experts)
    weights = ((values >> shifts) % np.uint64(1021)).astype(np.float32) / 1024
    return (
        ids.reshape(shape).astype(spec.id_dtype),
        weights.reshape(shape).astype(spec.weights_dtype),
    )


@dataclasses.dataclass
class New:
    """As vLLM's ``NewRequestData``."""

    req_id: str
    prompt_len: int
    num_computed_tokens: int
    block_ids: tuple[list[int], ...]


@dataclasses.dataclass
class Cached:
    """As vLLM's ``CachedRequestData``."""

    req_ids: list[str] = dataclasses.field(default_factory=list)
    resumed_req_ids: set[str] = dataclasses.field(default_factory=set)
    new_block_ids: list[tuple[list[int], ...] | None] = dataclasses.field(default_factory=list)
    num_computed_tokens: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Copy:
    """As vLLM's ``KVCacheBlockCopy``."""

    src_block_id: int
    dst_block_id: int


@dataclasses.dataclass
class Output:
    """As vLLM's ``SchedulerOutput``; `batch` is what the runner says after the step."""

    finished_req_ids: set[str]
    scheduled_new_reqs: list[New] = dataclasses.field(default_factory=list)
    scheduled_cached_reqs: Cached = dataclasses.field(default_factory=Cached)
    kv_cache_block_copies: list[Copy] | None = None
    loaded: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """As of `moescope_service.capture.loads.Notes`."""
    filled: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    total_num_scheduled_tokens: int = 0
    batch: list[tuple[Seq, int, int]] = dataclasses.field(default_factory=list)
    """(sequence, first position, rows), in row order."""
    missing: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    """Positions of each finished sequence whose rows cannot be known."""


class Engine:
    """Runs sequences step by step.

    Args:
        rng: Decides everything that is random.
        spec: Blocks and shape of the rows.
        token_budget: Tokens a step at most.
        copies: Whether blocks that match in part are hit and copied.
        speculation: How often a decoding sequence has drafts, most of which are rejected.
        loads: How often a connector has more of a waiting sequence than the cache.
    """

    def __init__(
        self,
        rng: random.Random,
        spec: CaptureSpec,
        *,
        token_budget: int = 9,
        copies: bool = False,
        speculation: float = 0.0,
        loads: float = 0.0,
    ) -> None:
        self.rng = rng
        self.kv = KvCache(spec.num_blocks, spec.block_size)
        self.token_budget = token_budget
        self.copies = copies
        self.speculation = speculation
        self.loads = loads
        self.num_rejected = 0
        self.waiting: list[Seq] = []
        self.running: list[Seq] = []
        self.loading: list[tuple[Seq, int]] = []
        """(sequence, where the load ends), while the connector fills its blocks."""
        self.num_loads = 0
        self.num_preemptions = 0
        self.num_same_step_hits = 0
        self.num_copies = 0
        self._finished: dict[str, Seq] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a step is left to schedule."""
        return bool(self.waiting or self.running or self.loading or self._finished)

    def add(self, seq: Seq) -> None:
        """Queue a sequence."""
        self.waiting.append(seq)

    def abort(self, seq: Seq) -> None:
        """End a sequence that waits or runs."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        self._free(seq)

    def schedule(self) -> Output:
        """Decide on a step."""
        output = Output(set(self._finished))
        output.missing = {name: self._missing(seq) for name, seq in self._finished.items()}
        self._finished = {}
        self._copies: list[Copy] = []
        self._num_copied: dict[int, int] = {}  # tokens that were hit, by the copy's block
        self._held: list[int] = []
        self._allocated: set[int] = set()
        self._filled = output.filled
        self._end_loads()
        scheduled: dict[str, tuple[Seq, int, list[int]]] = {}
        budget, preempted = self.token_budget, False
        for seq in list(self.running):
            if seq not in self.running:
                continue
            self._draft(seq, budget)
            count = min(len(seq.tokens) + len(seq.drafts) - seq.num_computed, budget)
            if count <= 0:
                continue
            while (blocks := self._grow(seq, seq.num_computed + count)) is None:
                victim, preempted = self.running[-1], True
                self._preempt(victim)
                if victim is seq:
                    break
            if blocks is not None:
                scheduled[seq.name] = seq, count, blocks
                budget -= count
        cached = output.scheduled_cached_reqs
        for seq, _, blocks in scheduled.values():
            self._list(cached, seq, blocks)
        batch = [(seq, seq.num_computed, count) for seq, count, _ in scheduled.values()]
        if not preempted:
            batch += self._admit_waiting(output, budget)
        self.rng.shuffle(batch)
        output.batch = batch
        self.kv.release(self._held)  # what is copied in this step is not allocated in it
        output.kv_cache_block_copies = self._copies or None
        output.total_num_scheduled_tokens = sum(count for _, _, count in batch)
        return output

    def _draft(self, seq: Seq, budget: int) -> None:
        is_decoding = len(seq.tokens) - seq.num_computed == 1 and not seq.is_over
        if self.speculation and is_decoding and self.rng.random() < self.speculation:
            count = min(self.rng.randint(1, MAX_DRAFTS), max(budget - 1, 0))
            seq.drafts = [self.rng.randrange(VOCABULARY) for _ in range(count)]

    def _list(self, cached: Cached, seq: Seq, blocks: list[int]) -> None:
        cached.req_ids.append(seq.name)
        cached.new_block_ids.append((blocks,) if blocks else None)
        cached.num_computed_tokens.append(seq.num_computed)

    def _admit_waiting(self, output: Output, budget: int) -> Iterator[tuple[Seq, int, int]]:
        resumed: list[Seq] = []
        while self.waiting and budget > 0 and len(self.running) < 6:
            seq = self.waiting[0]
            hits = seq.blocks if seq.is_loaded else self.kv.hits(seq)
            num_cached = seq.num_computed if seq.is_loaded else len(hits) * self.kv.size
            external, waits = (0, False) if seq.is_loaded else self._external(seq, num_cached)
            partial = None
            if self.copies and not external and not seq.is_loaded:
                partial = self.kv.partial_hit(seq, len(hits))
            start, num_cached = num_cached, num_cached + (partial[1] if partial else external)
            count = 0 if waits else min(len(seq.tokens) - num_cached, budget)
            needed = -(-(num_cached + count) // self.kv.size) - len(hits)
            held = [*hits, partial[0]] if partial else hits
            if needed > len(self.kv.free) - sum(block in self.kv.free for block in held):
                break
            self.waiting.pop(0)
            if not seq.is_loaded:
                self._hold(seq, hits, partial)
            if external:
                output.loaded += self._allocate_for_load(seq, num_cached)
                self.num_loads += 1
            if waits:
                seq.num_computed = start
                self.loading.append((seq, num_cached))
                continue
            self.kv.load(seq, start, start + external)
            self._start(seq, num_cached)
            self._grow(seq, num_cached + count)
            if partial:
                self._held.append(partial[0])
                self._copies.append(Copy(partial[0], seq.blocks[len(hits)]))
                self._num_copied[seq.blocks[len(hits)]] = partial[1]
                self.num_copies += 1
            self.running.append(seq)
            if seq.was_preempted:
                resumed.append(seq)
            else:
                output.scheduled_new_reqs.append(
                    New(seq.name, seq.prompt_len, num_cached, (list(seq.blocks),))
                )
            budget -= count
            yield seq, num_cached, count
        for seq in resumed:
            output.scheduled_cached_reqs.resumed_req_ids.add(seq.name)
            self._list(output.scheduled_cached_reqs, seq, list(seq.blocks))

    def _external(self, seq: Seq, num_cached: int) -> tuple[int, bool]:
        """Return how many tokens more the connector has, and whether loading them takes steps."""
        num_more = len(seq.tokens) - 1 - num_cached
        if num_more <= 0 or self.rng.random() >= self.loads:
            return 0, False
        return self.rng.randint(1, num_more), bool(self.rng.randrange(3))

    def _end_loads(self) -> None:
        """End some loads, of which not all succeed; their sequences wait to run."""
        for seq, end in list(self.loading):
            if self.rng.randrange(3):
                continue
            self.loading.remove((seq, end))
            start = seq.num_computed
            if self.rng.randrange(4):
                loaded = end
            else:  # some blocks at the end failed, or all of them
                loaded = self.rng.randint(start, end) // self.kv.size * self.kv.size
            seq.num_computed = max(start, loaded)
            self.kv.load(seq, start, seq.num_computed)
            self._filled += self.kv.remember(seq, seq.num_computed)
            seq.is_loaded = True
            self.waiting.insert(self.rng.randint(0, len(self.waiting)), seq)

    def _hold(self, seq: Seq, hits: list[int], partial: tuple[int, int] | None) -> None:
        for block in hits:
            self.num_same_step_hits += block in self._allocated
            self.kv.touch(block)
        if partial:
            self.kv.touch(partial[0])
        seq.blocks = list(hits)

    def _allocate(self, seq: Seq, num_tokens: int) -> list[int]:
        needed = -(-num_tokens // self.kv.size) - len(seq.blocks)
        blocks = self.kv.allocate(max(needed, 0))
        self._allocated |= set(blocks)
        seq.blocks += blocks
        return blocks

    def _allocate_for_load(self, seq: Seq, num_tokens: int) -> list[tuple[int, str]]:
        first = len(seq.blocks)
        loaded = []
        for number, block in enumerate(self._allocate(seq, num_tokens), first):
            end = (number + 1) * self.kv.size
            key = seq.hashes[end - 1] if end <= num_tokens else None
            if key in self.kv.left:
                self.kv.is_recalled.add(block)
            loaded.append((block, "" if key is None else str(key)))
        return loaded

    def _start(self, seq: Seq, num_cached: int) -> None:
        seq.table = [(block, self.kv.generation[block]) for block in seq.blocks]
        seq.num_computed, seq.is_loaded = num_cached, False
        if seq.cached_len is None:
            seq.cached_len = num_cached
        seq.num_routed = max(seq.num_routed, num_cached)

    def _grow(self, seq: Seq, num_tokens: int) -> list[int] | None:
        if -(-num_tokens // self.kv.size) - len(seq.blocks) > len(self.kv.free):
            return None
        blocks = self._allocate(seq, num_tokens)
        seq.table += [(block, self.kv.generation[block]) for block in blocks]
        if not seq.is_over:
            # Drafts are no prefix of any sequence.
            self._filled += self.kv.remember(seq, min(num_tokens, len(seq.tokens)))
        return blocks

    def _preempt(self, seq: Seq) -> None:
        self.running.remove(seq)
        self.num_preemptions += 1
        seq.drafts = []
        if seq.is_over:
            self._free(seq)
            return
        self.kv.release(seq.blocks)
        seq.blocks, seq.num_computed, seq.was_preempted = [], 0, True
        self.waiting.insert(0, seq)

    def _free(self, seq: Seq) -> None:
        self.kv.release(seq.blocks)
        seq.blocks = []
        self._finished[seq.name] = seq

    def execute(self, output: Output, *, shipped: bool) -> list[Seq]:
        """Compute a step's rows and sample; return the sequences that have their last token."""
        kv, over = self.kv, []
        for copy in output.kv_cache_block_copies or ():
            for i in range(kv.size):
                source, slot = copy.src_block_id * kv.size + i, copy.dst_block_id * kv.size + i
                kv.content[slot] = kv.content[source]  # behind the hit it is another sequence's
                is_hit = i < self._num_copied[copy.dst_block_id]
                kv.shipped[slot] = is_hit and kv.shipped[source]
        for seq, start, count in output.batch:
            for position, content in enumerate(seq.row_hashes(start, count), start):
                slot = seq.blocks[position // kv.size] * kv.size + position % kv.size
                kv.content[slot], kv.shipped[slot] = content, shipped
            seq.num_computed = start + count
            seq.num_routed = max(seq.num_routed, seq.num_computed)
        for seq, start, _ in output.batch:
            self._check_prefix(seq, start)
            if seq.is_over:  # this was its surplus row
                self.running.remove(seq)
                self._free(seq)
            elif seq.num_computed >= len(seq.tokens):
                self._sample(seq)
                if len(seq.tokens) - seq.prompt_len >= seq.max_output:
                    over.append(seq)
                    seq.is_over = True
                    if not seq.surplus:
                        self.running.remove(seq)
                        self._free(seq)
        return over

    def _sample(self, seq: Seq) -> None:
        """Append the next token, and as many more as the drafts had guessed."""
        drafts, seq.drafts = seq.drafts, []
        while True:
            seq.tokens.append(seq.hashes[-1] % VOCABULARY)
            seq.extend_hashes()
            is_full = len(seq.tokens) - seq.prompt_len >= seq.max_output
            if is_full or not drafts or drafts.pop(0) != seq.tokens[-1]:
                break
        self.num_rejected += seq.num_computed - len(seq.tokens) + 1
        seq.num_computed = len(seq.tokens) - 1

    def _check_prefix(self, seq: Seq, start: int) -> None:
        """The engine itself must be right: every KV entry is that of its own prefix."""
        for position in range(start):
            slot = seq.blocks[position // self.kv.size] * self.kv.size + position % self.kv.size
            if self.kv.content[slot] != seq.hashes[position]:
                raise AssertionError(f"{seq.name}: position {position} has another prefix's entry")

    def _missing(self, seq: Seq) -> set[int]:
        gone = set()
        for position in range(len(seq.tokens) - 1):
            number, offset = divmod(position, self.kv.size)
            known = position < seq.num_routed and number < len(seq.table)
            if known:
                block, generation = seq.table[number]
                known = generation == self.kv.generation[block]
                known = known and self.kv.shipped[block * self.kv.size + offset]
            if not known:
                gone.add(position)
        return gone
