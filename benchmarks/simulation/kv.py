"""The simulated engine's sequences and its paged, prefix-caching KV cache."""

from __future__ import annotations

import dataclasses

_MASK = 2**64 - 1


def chain(before: int, token: int) -> int:
    """Hash of a prefix and one more token."""
    value = (before ^ (token + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@dataclasses.dataclass
class Seq:
    """A sequence of the engine; `tokens` are all that were sampled."""

    name: str
    tokens: list[int]
    prompt_len: int
    max_output: int
    surplus: bool
    hashes: list[int] = dataclasses.field(default_factory=list)
    drafts: list[int] = dataclasses.field(default_factory=list)
    """Guesses of the tokens that follow, which this step routes as well (speculation)."""
    blocks: list[int] = dataclasses.field(default_factory=list)
    table: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(block, generation): kept after a preemption, as the collector keeps its own."""
    num_computed: int = 0
    cached_len: int | None = None
    num_routed: int = 0
    was_preempted: bool = False
    is_over: bool = False
    """It has its last token, and runs one step more."""
    is_loaded: bool = False
    """Its blocks hold the KV entries of `num_computed` tokens, and it waits to run."""

    def __post_init__(self) -> None:
        self.extend_hashes()

    def extend_hashes(self) -> None:
        """Hash the prefixes that end with tokens that are new."""
        for token in self.tokens[len(self.hashes) :]:
            self.hashes.append(chain(self.hashes[-1] if self.hashes else 7, token))

    def row_hashes(self, start: int, count: int) -> list[int]:
        """Hashes of the prefixes that the rows of this step end."""
        hashes = list(self.hashes)
        for token in self.drafts:
            hashes.append(chain(hashes[-1], token))
        return hashes[start : start + count]


class KvCache:
    """Blocks: who holds them, which prefixes are cached in them, which rows were shipped."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.free: dict[int, None] = dict.fromkeys(range(1, num_blocks))  # block 0 is vLLM's null
        self.refs = [0] * num_blocks
        self.generation = [0] * num_blocks
        self.by_hash: dict[int, int] = {}
        self.hash_of: dict[int, int] = {}
        self.content: list[int | None] = [None] * (num_blocks * block_size)
        """Hash of the prefix whose KV entry stands in a slot."""
        self.shipped = [False] * (num_blocks * block_size)
        """Whether the collector was given the row of that entry."""
        self.left: set[int] = set()
        """Hashes of blocks that were taken while the collector had all their rows."""
        self.is_recalled: set[int] = set()
        """Blocks for a load whose rows it has."""

    def allocate(self, count: int) -> list[int]:
        """Take blocks that are free, the least recently used first; forget what was in them."""
        blocks = list(self.free)[:count]
        for block in blocks:
            del self.free[block]
            self.refs[block] = 1
            self.generation[block] += 1
            slots = range(block * self.size, (block + 1) * self.size)
            if (known := self.hash_of.pop(block, None)) is not None:
                del self.by_hash[known]
                if all(self.shipped[slot] for slot in slots):
                    self.left.add(known)
            self.is_recalled.discard(block)
            for slot in slots:
                self.content[slot], self.shipped[slot] = None, False
        return blocks

    def touch(self, block: int) -> None:
        """Hold a cached block once more."""
        self.free.pop(block, None)
        self.refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Hold blocks once less; the last ones of a sequence are used again first."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if not self.refs[block]:
                self.free[block] = None

    def load(self, seq: Seq, start: int, end: int) -> None:
        """Write KV entries that nothing in this engine computed into a sequence's blocks."""
        for position in range(start, end):
            slot = seq.blocks[position // self.size] * self.size + position % self.size
            self.content[slot] = seq.hashes[position]
            self.shipped[slot] = seq.blocks[position // self.size] in self.is_recalled

    def forget_rows(self) -> None:
        """Let the collector have no row."""
        self.shipped = [False] * len(self.shipped)
        self.left.clear()
        self.is_recalled.clear()

    def remember(self, seq: Seq, num_tokens: int) -> list[tuple[int, str]]:
        """Cache the full blocks of a sequence's first tokens; return (block, key) of each."""
        cached = []
        for number in range(num_tokens // self.size):
            key, block = seq.hashes[(number + 1) * self.size - 1], seq.blocks[number]
            if key not in self.by_hash and block not in self.hash_of:
                self.by_hash[key], self.hash_of[block] = block, key
                cached.append((block, str(key)))
        return cached

    def hits(self, seq: Seq) -> list[int]:
        """Return the full cached blocks that a sequence begins with."""
        blocks: list[int] = []
        while (len(blocks) + 1) * self.size < len(seq.tokens):
            block = self.by_hash.get(seq.hashes[(len(blocks) + 1) * self.size - 1])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def partial_hit(self, seq: Seq, full: int) -> tuple[int, int] | None:
        """A filled cached block that begins as the sequence goes on: (block, tokens)."""
        start = full * self.size
        for block in self.hash_of:
            slots = self.content[block * self.size : (block + 1) * self.size]
            common = 0
            for mine, theirs in zip(seq.hashes[start : len(seq.tokens) - 1], slots, strict=False):
                if mine != theirs:
                    break
                common += 1
            if common and None not in slots:
                return block, min(common, self.size - 1)
        return None
