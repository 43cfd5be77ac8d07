"""What every input is read as: rows of one model, some at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from moescope.analysis import PHASES, Rows
from moescope.errors import CommandError
from moescope.route_files import Kept
from moescope.trace import RouteTrace

_BATCH_IDS = 2**24
_BATCH_ROWS = 2**16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What inputs must have in common."""

    layers: tuple[int, ...]
    """Global layer numbers."""
    num_experts: int
    top_k: int
    name: str | None = None
    """The served model's name; None where an input does not say it."""

    @classmethod
    def of(cls, trace: RouteTrace) -> Self:
        """Return what a trace is of."""
        return cls(
            layers=tuple(trace.layers.tolist()),
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            name=trace.model or None,
        )

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
        return min(max(_BATCH_IDS // max(len(self.layers) * self.top_k, 1), 256), _BATCH_ROWS)


Key = tuple[str, int]
"""A sequence: the id of its request, and its choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """What is known of a sequence, or of a part of it, besides its routes."""

    prompt_len: int
    token_ids: npt.NDArray[np.int32] | None
    """Prompt and output; None where they are not known."""
    start: int = 0
    """The position of the first of them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows of one sequence of an input."""

    model: Model
    rows: Rows
    key: Key
    text: Text | None
    """Of the rows that are missing, too; None where the prompt is not known."""
    num_missing: int
    """Rows that were not captured, and are not among them."""
    done: float
    """The part of the input that is read with them, 0 to 1."""
    token_texts: Mapping[int, str]
    """The text of token ids that no batch before had, where the input has it."""


def of(traces: Iterable[Kept], label: str = "") -> Iterator[Batch]:
    """Yield the rows of traces, `Model.batch_rows` of one at most, in their order.

    Args:
        traces: Those of an input.
        label: Its label.

    Raises:
        CommandError: They are of several models.
    """
    first: Model | None = None
    told: set[int] = set()
    for kept in traces:
        trace, model = kept.trace, Model.of(kept.trace)
        first = first or model
        if model != first:
            raise CommandError(
                f"it holds routes of several models ({first}; {model}): expected one model"
            )
        for start in range(0, max(trace.num_rows, 1), model.batch_rows):
            page = trace.page(trace.start + start, model.batch_rows)
            texts = _texts(page, told)
            told |= texts.keys()
            yield Batch(
                model=model,
                rows=_rows(page, label, knows_prompt=kept.knows_prompt),
                key=(page.request_id, page.index),
                text=Text(prompt_len=page.prompt_len, token_ids=page.token_ids, start=page.start)
                if kept.knows_prompt
                else None,
                num_missing=int((~page.present).sum()),
                done=kept.done,
                token_texts=texts,
            )


def _rows(page: RouteTrace, label: str, *, knows_prompt: bool) -> Rows:
    rows = Rows.of(page, label)
    if knows_prompt:
        return rows
    unknown = np.full(rows.num_rows, PHASES.index("unknown"), np.uint8)
    return dataclasses.replace(rows, phases=unknown)


def _texts(page: RouteTrace, told: set[int]) -> dict[int, str]:
    """Return the text of the token ids that are new; the last of a route log may have none."""
    if page.tokens is None or page.token_ids is None:
        return {}
    pairs = zip(page.token_ids.tolist(), page.tokens, strict=True)
    return {token: text for token, text in pairs if text and token not in told}


def gathered(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Yield batches of one model together that are worth a call of numpy: most have few rows."""
    waiting: list[Batch] = []
    num_rows = 0
    for batch in batches:
        if waiting and num_rows + batch.rows.num_rows > batch.model.batch_rows:
            yield waiting
            waiting, num_rows = [], 0
        waiting.append(batch)
        num_rows += batch.rows.num_rows
    if waiting:
        yield waiting
