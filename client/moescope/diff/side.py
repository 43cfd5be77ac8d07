"""A side of a comparison: its sequences in memory, its rows on disk, at hand in any order."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moescope import formats
from moescope.analysis import NO_TOKEN, Rows, request_number
from moescope.analyze import inputs
from moescope.analyze.batches import Batch, Key, Model, Text
from moescope.analyze.inputs import Input
from moescope.errors import CommandError

Tokens = npt.NDArray[np.int32]


@dataclasses.dataclass(slots=True, eq=False)
class TokenSequence:
    """A sequence: what is known of it besides its routes."""

    request_id: str
    index: int
    """Its choice."""
    prompt_len: int | None = None
    tokens: Tokens | None = None
    """Prompt and output; `NO_TOKEN` where one is not known, None where none is."""

    @property
    def prompt(self) -> bytes | None:
        """The prompt's token ids; None where they are not all known."""
        if self.prompt_len is None or self.tokens is None:
            return None
        prompt = self.tokens[: self.prompt_len]
        is_whole = len(prompt) == self.prompt_len and bool((prompt != NO_TOKEN).all())
        return prompt.tobytes() if is_whole else None

    def add(self, text: Text) -> None:
        """Take what is known of it, or of a part of it."""
        self.prompt_len = text.prompt_len
        if text.token_ids is None:
            return
        known = np.full(0, NO_TOKEN, np.int32) if self.tokens is None else self.tokens
        end = text.start + len(text.token_ids)
        tokens = np.full(max(end, len(known)), NO_TOKEN, np.int32)
        tokens[: len(known)] = known
        tokens[text.start : end] = text.token_ids
        self.tokens = tokens


class Side:
    """Rows of one model, as `read` makes it.

    About 30 bytes a row are in memory, and the token ids.

    Attributes:
        name: What it is called in messages.
        model: What the rows are of.
        sequences: Those that have a row.
        sequence: The place of each row's sequence among them, ``[num_rows]``.
        position: The position of each row's token, ``[num_rows]``.
        num_missing: Rows that were not captured.
    """

    def __init__(self, name: str, model: Model, num_missing: int, draft: _Draft) -> None:
        self.name = name
        self.model, self.num_missing = model, num_missing
        self.sequences: Sequence[TokenSequence] = draft.sequences
        self.sequence = _joined(draft.columns["sequence"], np.int32)
        self.position = _joined(draft.columns["position"], np.int32)
        self._phases = _joined(draft.columns["phase"], np.uint8)
        self._numbers = np.array(
            [request_number(one.request_id) for one in self.sequences], np.uint64
        )
        keys = _keys(self.sequence, self.position)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._ids = draft.ids
        self._weights = draft.weights if draft.has_weights else None
        self._check_once()

    def _check_once(self) -> None:
        again = np.flatnonzero(np.diff(self._keys) == 0)
        if len(again):
            row = self._order[again[0]]
            one = self.sequences[self.sequence[row]]
            raise CommandError(
                f"{self.name} has position {self.position[row]} of request {one.request_id}, "
                f"choice {one.index}, twice: give every request once"
            )

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.sequence)

    def find(
        self, sequence: npt.NDArray[np.integer], position: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.int64]:
        """Return the numbers of rows, ``[num]``; -1 where there is none.

        Args:
            sequence: Their sequences, ``[num]``.
            position: Their positions, ``[num]``.
        """
        wanted = _keys(sequence, position)
        place = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[place] == wanted, self._order[place], -1)

    def rows(self, numbers: npt.NDArray[np.integer]) -> Rows:
        """Return rows by their numbers, without the ids of their tokens."""
        return Rows(
            num_experts=self.model.num_experts,
            topk_ids=self._ids.rows(numbers),
            topk_weights=None if self._weights is None else self._weights.rows(numbers),
            token_ids=np.full(len(numbers), NO_TOKEN, np.int32),
            positions=self.position[numbers],
            phases=self._phases[numbers],
            requests=self._numbers[self.sequence[numbers]],
        )


class _OnDisk:
    """An array ``[num_rows, num_layers, top_k]`` in a file without a name.

    Args:
        file: The file.
        shape: Of a row.
        dtype: The dtype.
    """

    def __init__(self, file: IO[bytes], shape: tuple[int, int], dtype: npt.DTypeLike) -> None:
        self._file, self._shape, self._dtype = file, shape, np.dtype(dtype)
        self._map: mmap.mmap | None = None

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Write the next rows."""
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)

    def rows(self, numbers: npt.NDArray[np.integer]) -> npt.NDArray[Any]:
        """Return rows by their numbers; none is written afterwards."""
        if self._map is None:
            self._file.flush()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        every = np.frombuffer(self._map, self._dtype).reshape(-1, *self._shape)
        rows: npt.NDArray[Any] = every[numbers]
        self._map.madvise(mmap.MADV_DONTNEED)  # the file's pages are not this process's memory
        return rows


class _Draft:
    """A side while it is read.

    Args:
        model: What its rows are of.
        files: For expert ids and for weights.
    """

    def __init__(self, model: Model, files: Sequence[IO[bytes]]) -> None:
        shape = (len(model.layers), model.top_k)
        self.ids = _OnDisk(files[0], shape, formats.id_dtype(model.num_experts))
        self.weights = _OnDisk(files[1], shape, np.float32)
        self.has_weights = True
        self.columns: dict[str, list[npt.NDArray[Any]]] = {
            "sequence": [],
            "position": [],
            "phase": [],
        }
        self._every: dict[Key, TokenSequence] = {}  # those whose rows are all missing, too
        self._places: dict[Key, int] = {}

    def add(self, batch: Batch) -> None:
        """Take rows, and what is known of their sequence."""
        rows = batch.rows
        one = self._every.setdefault(batch.key, TokenSequence(*batch.key))
        if batch.text is not None:
            one.add(batch.text)
        if not rows.num_rows:
            return
        number = self._places.setdefault(batch.key, len(self._places))
        self.columns["sequence"].append(np.full(rows.num_rows, number, np.int32))
        self.columns["position"].append(rows.positions.astype(np.int32))
        self.columns["phase"].append(rows.phases)
        self.ids.add(rows.topk_ids)
        self.has_weights &= rows.topk_weights is not None
        if rows.topk_weights is not None and self.has_weights:
            self.weights.add(rows.topk_weights)

    @property
    def sequences(self) -> list[TokenSequence]:
        """Those that have a row."""
        return [self._every[key] for key in self._places]


def read(
    name: str,
    found: Sequence[Input],
    files: Sequence[IO[bytes]],
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    folder: Path | None = None,
    tell: Callable[[float], None],
) -> Side:
    """Read the inputs of a side.

    Args:
        name: What it is called in messages.
        found: The inputs, of one model.
        files: Two empty files, open as long as the side is used.
        num_experts: As `inputs.read` takes it.
        top_k: As `inputs.read` takes it.
        folder: As `inputs.read` takes it.
        tell: Is told which part is read, 0 to 1.

    Raises:
        CommandError: They are of several models, have no row, or one twice.
        FormatError: A file is broken.
        OSError: There is no room for the rows.
    """
    reader = inputs.Reader(found, num_experts, top_k, folder=folder)
    draft: _Draft | None = None
    for batch in reader.batches(""):
        draft = draft or _Draft(batch.model, files)
        draft.add(batch)
        tell(batch.done)
    if draft is None or reader.model is None or not draft.sequences:
        raise CommandError(
            f"{name} has no routed token ({reader.num_missing:,} rows are missing): there "
            "is nothing to compare"
        )
    return Side(name, reader.model, reader.num_missing, draft)


def _joined(parts: list[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    joined: npt.NDArray[Any] = np.concatenate(parts).astype(dtype)
    return joined


def _keys(
    sequence: npt.NDArray[np.integer], position: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """Return sequence and position in one number: both have 31 bits."""
    keys: npt.NDArray[np.int64] = sequence.astype(np.int64) << 32 | position
    return keys
