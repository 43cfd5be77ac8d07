"""Which sequences of two sides belong together, and up to where they are of the same tokens."""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moescope.analysis import NO_TOKEN
from moescope.diff.side import Tokens, TokenSequence

NEVER = 2**31
"""The position where texts diverge that do not: beyond all tokens."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Sequences of two sides that belong together."""

    a: npt.NDArray[np.int64]
    """Their places among those of the first side, ``[num_pairs]``, ascending."""
    b: npt.NDArray[np.int64]
    """Their places among those of the second side, ``[num_pairs]``."""
    divergence: npt.NDArray[np.int64]
    """The first position with another token, ``[num_pairs]``; `NEVER` where there is none."""
    has_texts: npt.NDArray[np.bool_]
    """Whether the token ids of both are known, ``[num_pairs]``."""
    num_by_id: int
    """Those paired by the id of their request; the others are by their prompt."""

    @property
    def diverged(self) -> npt.NDArray[np.bool_]:
        """Whether their texts are known to diverge, ``[num_pairs]``."""
        return self.divergence < NEVER

    def __len__(self) -> int:
        return len(self.a)


def pair(a: Sequence[TokenSequence], b: Sequence[TokenSequence]) -> Pairs:
    """Pair sequences: those of the same request id and choice, the others by prompt and choice.

    The same id with another prompt is another request. Of equal prompts the first of one side goes
    with the first of the other, and so on.
    """
    partner = _by_id(a, b)
    num_by_id = len(partner)
    partner |= _by_prompt(a, b, partner)
    places = sorted(partner)
    others = [partner[one] for one in places]
    texts = [(a[one].tokens, b[other].tokens) for one, other in zip(places, others, strict=True)]
    return Pairs(
        a=np.array(places, np.int64),
        b=np.array(others, np.int64),
        divergence=np.array([_divergence(*both) for both in texts], np.int64),
        has_texts=np.array([all(one is not None for one in both) for both in texts], np.bool_),
        num_by_id=num_by_id,
    )


def _by_id(a: Sequence[TokenSequence], b: Sequence[TokenSequence]) -> dict[int, int]:
    there = {(one.request_id, one.index): place for place, one in enumerate(b)}
    found = {}
    for place, one in enumerate(a):
        other = there.get((one.request_id, one.index))
        if other is None:
            continue
        prompts = (one.prompt, b[other].prompt)
        if None in prompts or prompts[0] == prompts[1]:
            found[place] = other
    return found


def _by_prompt(
    a: Sequence[TokenSequence], b: Sequence[TokenSequence], paired: dict[int, int]
) -> dict[int, int]:
    waiting: dict[tuple[bytes, int], deque[int]] = defaultdict(deque)
    taken = set(paired.values())
    for place, one in enumerate(b):
        if place not in taken and one.prompt is not None:
            waiting[one.prompt, one.index].append(place)
    found = {}
    for place, one in enumerate(a):
        if place not in paired and one.prompt is not None and waiting[one.prompt, one.index]:
            found[place] = waiting[one.prompt, one.index].popleft()
    return found


def _divergence(tokens: Tokens | None, others: Tokens | None) -> int:
    """Return the first position with another token; a text that only ends earlier has none."""
    if tokens is None or others is None:
        return NEVER
    num = min(len(tokens), len(others))
    one, other = tokens[:num], others[:num]
    differs = (one != other) & (one != NO_TOKEN) & (other != NO_TOKEN)
    return int(differs.argmax()) if differs.any() else NEVER
