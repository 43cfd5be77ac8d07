"""What every kind of input is read as: rows of one model, some at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope.analysis import PHASES, Rows, request_number
from moescope.errors import CommandError
from moescope.received import MAX_TOKENS, is_int, shown

_BATCH_IDS = 2**24
_BATCH_ROWS = 2**16
_UNKNOWN = -1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What inputs must have in common."""

    layers: tuple[int, ...]
    """Global layer numbers."""
    num_experts: int
    top_k: int
    name: str | None = None
    """The served model's name; None where an input does not say it."""

    def __str__(self) -> str:
        """Say it in words, for messages and pictures."""
        return (
            f"{self.name or 'unknown model'}, {len(self.layers)} layers, "
            f"top-{self.top_k} of {self.num_experts}"
        )

    def joined(self, other: Model, where: str) -> Model:
        """Return what both are, with the name that either has.

        Args:
            other: What another input is of.
            where: The inputs, for the message.

        Raises:
            CommandError: They are not of one model.
        """
        name = self.name or other.name
        first, this = (dataclasses.replace(each, name=each.name or name) for each in (self, other))
        if first != this:
            layers = f"; layers {list(first.layers)} and {list(this.layers)}"
            raise CommandError(
                f"{where} are not of one model ({first}; {this}"
                f"{layers if first.layers != this.layers else ''}): give inputs of one model"
            )
        return first

    @property
    def batch_rows(self) -> int:
        """Rows of a batch: few enough for the memory, enough to be worth numpy's calls."""
        return int(np.clip(_BATCH_IDS // max(len(self.layers) * self.top_k, 1), 256, _BATCH_ROWS))


Key = tuple[str, int]
"""A sequence: the id of its request, and its choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """What is known of a sequence, or of a part of it, besides its routes."""

    prompt_len: int
    token_ids: Sequence[int] | npt.NDArray[np.integer] | None
    """Prompt and output; None where they are not known."""
    start: int = 0
    """The position of the first of them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Some rows of an input."""

    model: Model
    rows: Rows
    keys: Sequence[Key]
    """Sequences, those of the rows among them."""
    places: npt.NDArray[np.integer]
    """The place of each row's sequence among them, ``[num_rows]``."""
    num_missing: int
    """Rows that were not captured, and are not among them."""
    done: float
    """The part of the input that is read with them, 0 to 1."""
    token_texts: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """The text of token ids, where the input has it: of those that are new, or of all."""


class Sequences:
    """Where the sequences of a file are, and what their rows are; no loop over rows.

    Args:
        metas: The fields of each trace that are not arrays.
        label: The label of the input.

    Raises:
        CommandError: They are of several models.
        LookupError: A field is missing.
        ValueError: A field is out of range.
    """

    def __init__(self, metas: Sequence[Mapping[str, Any]], label: str) -> None:
        _check_positions(metas)
        self.names = {str(meta["model"]) for meta in metas}
        sizes = {int(meta["num_experts"]) for meta in metas}
        if len(self.names) > 1 or len(sizes) > 1:
            raise CommandError(
                f"it holds routes of several models ({', '.join(sorted(self.names))}; "
                f"{', '.join(map(str, sorted(sizes)))} experts): expected one model"
            )
        self.num_experts = sizes.pop() if sizes else 0
        self.num_tokens = sum(int(meta["num_tokens"]) for meta in metas)
        self._starts = np.array([meta["start"] for meta in metas], np.int64)
        prompts = [_UNKNOWN if meta["prompt_len"] is None else meta["prompt_len"] for meta in metas]
        self._prompt_lens = np.array(prompts, np.int64)
        self.keys: list[Key] = [(str(meta["request_id"]), int(meta["index"])) for meta in metas]
        numbers = [request_number(request_id, label) for request_id, _ in self.keys]
        self._requests = np.array(numbers, np.uint64)

    @property
    def name(self) -> str | None:
        """The model's name."""
        return next(iter(self.names), None)

    def columns(
        self, sequence: npt.NDArray[np.integer], place: npt.NDArray[np.integer]
    ) -> dict[str, npt.NDArray[Any]]:
        """Return the positions, phases and requests of rows.

        Args:
            sequence: The number of each row's sequence in the file, ``[num_rows]``.
            place: Its place among the rows of the sequence, ``[num_rows]``.
        """
        positions = self._starts[sequence] + place
        prompt_lens = self._prompt_lens[sequence]
        phases = (positions >= prompt_lens).astype(np.uint8)
        phases[prompt_lens == _UNKNOWN] = PHASES.index("unknown")
        return {
            "positions": positions,
            "phases": phases,
            "requests": self._requests[sequence],
        }


def _check_positions(metas: Sequence[Mapping[str, Any]]) -> None:
    """Check what says where tokens are, before anything of these sizes is made."""
    for meta in metas:
        for name in ("start", "prompt_len", "num_tokens"):
            is_unknown = name == "prompt_len" and meta[name] is None
            if not (is_unknown or (is_int(meta[name]) and 0 <= meta[name] <= MAX_TOKENS)):
                raise ValueError(f"{name} is {shown(meta[name], 80)}")


def check_ids(ids: npt.NDArray[np.integer], num_experts: int) -> None:
    """Check expert ids.

    Raises:
        ValueError: One is out of range.
    """
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
        raise ValueError(
            f"expert ids must be 0 to {num_experts - 1}, got {int(ids.min())} to {int(ids.max())}"
        )


def gathered(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Join batches of one model until they are worth a call of numpy: many files have few rows."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(one.rows.num_rows for one in waiting) >= batch.model.batch_rows // 2:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(batches: Sequence[Batch]) -> Batch:
    firsts = np.cumsum([0, *(len(one.keys) for one in batches[:-1])])
    return dataclasses.replace(
        batches[-1],
        rows=Rows.joined([one.rows for one in batches]),
        keys=[key for one in batches for key in one.keys],
        places=np.concatenate([one.places + at for one, at in zip(batches, firsts, strict=True)]),
        num_missing=sum(one.num_missing for one in batches),
        token_texts={token: text for one in batches for token, text in one.token_texts.items()},
    )
