"""Messages between workers, API servers and the collector.

A message is a list of ZMQ frames: a JSON control frame, then the arrays as raw bytes. Where too
much waits, rows are dropped and control is not: a step whose rows could not be shipped names the
reason in ``lost``, and its spans say which rows those are. Only for a collector that hangs for long
are whole steps given up (`moescope_service.link`): by the gap in their numbers both sides know that
nothing of before holds, and sequences that ended in it are named in the next message that is sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

Frames = Sequence[Any]
"""ZMQ frames: objects with the buffer protocol."""

MESSAGE_BYTES = 2**20
"""Rows of a message at most, in bytes: ZMQ's queues count messages, and are to be bounded."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a worker captures; it introduces the worker on every new connection."""

    engine: int
    """Number of the data-parallel engine."""
    num_engines: int
    """Engines of the deployment."""
    stage: int
    """Number of the pipeline stage; of a stage's tensor-parallel workers the first one sends."""
    num_stages: int
    """Pipeline stages of each engine."""
    layers: list[int]
    """The stage's layers with experts; a stage may have none, and then sends no steps."""
    num_hidden_layers: int
    """Layers of the model, those without experts included."""
    num_experts: int
    top_k: int
    id_dtype: str
    weights_dtype: str
    router_types: list[str]
    block_size: int
    """Tokens a KV-cache block."""
    num_blocks: int
    trust_prefix_hits: bool
    """False where cached blocks can hold tokens that no worker of ours routed (KV connectors)."""
    model: str
    device: str
    seed: int | None
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """A sequence that starts to run, or runs again after a preemption."""

    handle: int
    """The worker's small integer for the sequence, reused after its end."""
    request_id: str
    """The engine's internal request id."""
    prompt_len: int
    num_computed: int
    """Tokens whose KV-cache entries were found in the prefix cache."""
    block_ids: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Ongoing:
    """A sequence that runs while its worker introduces itself to a new collector."""

    admission: Admission
    """Its table as far as its blocks are still its own; ``num_computed`` of its first admission."""
    num_rows: int
    """Positions routed so far, whose rows only the collector before had."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where a worker stands when it introduces itself to a collector that saw none of its steps."""

    next_seq: int
    """Number of the step that follows."""
    ongoing: list[Ongoing]
    ended: list[str]
    """Internal ids of sequences that ended lately: the end may have been told to nobody."""


LOST_REASONS = ("queue_full", "paused", "hook_missed")
"""Why a step's rows can be missing: the worker's queue was full, the capture was paused, or a layer
did not hand over the rows of this step."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Step:
    """One engine step of one worker: control, and the rows it routed."""

    seq: int
    """Number of the step, from 0 without gaps."""
    time_s: float = 0.0
    """Unix time of the capture, in seconds."""
    host_s: float = 0.0
    """Seconds that the capture spent on the worker's thread since the step before."""
    finished: list[int] = dataclasses.field(default_factory=list)
    """Handles of sequences that ended; processed before everything else."""
    finished_unseen: list[str] = dataclasses.field(default_factory=list)
    """Internal ids of sequences that ended before they were ever scheduled."""
    admitted: list[Admission] = dataclasses.field(default_factory=list)
    resumed: list[Admission] = dataclasses.field(default_factory=list)
    grown: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)
    """(handle, newly allocated block ids)."""
    block_copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(source block, destination block), copied before the step's rows are written."""
    part: int = 0
    """Number of the piece, where the step was too large for one message; see `pieces`."""
    has_more: bool = False
    """Whether another piece follows."""
    lost: str | None = None
    """Why the rows are not here, one of `LOST_REASONS`."""
    spans: npt.NDArray[np.int32]
    """(handle, first position, rows) of every sequence in the step, in row order, ``[n, 3]``."""
    topk_ids: npt.NDArray[Any] | None = None
    """``[num_rows, num_layers, top_k]``."""
    topk_weights: npt.NDArray[Any] | None = None

    @property
    def rows_bytes(self) -> int:
        """Bytes of the rows."""
        arrays = (self.topk_ids, self.topk_weights)
        return sum(array.nbytes for array in arrays if array is not None)

    def pieces(self, max_bytes: int) -> Iterator[Step]:
        """Cut a step whose rows are larger than that; control goes with the first piece."""
        if self.topk_ids is None or self.topk_weights is None or self.rows_bytes <= max_bytes:
            yield self
            return
        num_rows = len(self.topk_ids)
        size = max(1, max_bytes * num_rows // self.rows_bytes)
        ends = np.cumsum(self.spans[:, 2])
        starts = ends - self.spans[:, 2]
        for part, first in enumerate(range(0, num_rows, size)):
            last = min(first + size, num_rows)
            here = (starts < last) & (ends > first)
            spans = self.spans[here]
            spans[:, 1] += np.maximum(first - starts[here], 0)
            spans[:, 2] = np.minimum(ends[here], last) - np.maximum(starts[here], first)
            yield dataclasses.replace(
                self if part == 0 else Step(seq=self.seq, time_s=self.time_s, spans=spans),
                part=part,
                has_more=last < num_rows,
                spans=spans,
                topk_ids=self.topk_ids[first:last],
                topk_weights=self.topk_weights[first:last],
            )


class RequestKey(NamedTuple):
    """What all choices of all prompts of one request share, and no other request has.

    The id alone is not enough: a client may give several requests the same ``X-Request-Id``.
    """

    request_id: str
    created_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """An API server tells which ids a client sees for one sequence of the engine."""

    internal_id: str
    request_id: str
    """The id in the response."""
    ids: list[str]
    """Every id that finds the sequence."""
    index: int
    model: str
    lora: str | None
    prompt_len: int
    created_s: float
    keep: bool
    """False where the request opted out: its trace is not kept."""


def pack(kind: str, arrays: Frames = (), **fields: Any) -> list[Any]:
    """Return the frames of a message.

    Args:
        kind: ``hello``, ``steps``, ``server``, ``register``, ``query``, ``reply`` …
        arrays: Frames behind the control frame, contiguous.
        fields: The control frame's values.
    """
    return [orjson.dumps({"kind": kind, **fields}), *arrays]


def pack_hello(
    hello: Hello, *, is_capturing: bool = True, snapshot: Snapshot | None = None
) -> list[Any]:
    """Return the frames with which a worker introduces itself.

    Args:
        hello: What it captures.
        is_capturing: Whether it does, as a collector has ordered.
        snapshot: Where it stands, unless its first step is yet to come.
    """
    stands = None if snapshot is None else dataclasses.asdict(snapshot)
    return pack("hello", **dataclasses.asdict(hello), is_capturing=is_capturing, snapshot=stands)


def unpack_hello(values: dict[str, Any]) -> tuple[Hello, bool, Snapshot | None]:
    """Return what a worker captures, whether it does, and where it stands; see `pack_hello`."""
    is_capturing, snapshot = values.pop("is_capturing"), values.pop("snapshot")
    if snapshot is not None:
        ongoing = [
            Ongoing(Admission(**one["admission"]), one["num_rows"]) for one in snapshot["ongoing"]
        ]
        snapshot = Snapshot(**{**snapshot, "ongoing": ongoing})
    return Hello(**values), is_capturing, snapshot


def unpack(frames: Frames) -> tuple[str, dict[str, Any]]:
    """Return the kind of a message and its control values.

    Raises:
        ValueError: The first frame is no control frame.
    """
    values = orjson.loads(frames[0])
    return values.pop("kind"), values


_ARRAYS = frozenset({"spans", "topk_ids", "topk_weights"})
_CONTROL = tuple(f.name for f in dataclasses.fields(Step) if f.name not in _ARRAYS)


def pack_steps(steps: Sequence[Step]) -> list[Any]:
    """Return the frames of consecutive steps of one worker; the arrays are copies.

    Control, then the spans of all steps one after the other, then their rows where there are any:
    ids, weights. Control says how many spans and rows each step has; what is empty is left out.
    """
    control = []
    for step in steps:
        values = {name: value for name in _CONTROL if (value := getattr(step, name))}
        num_rows = 0 if step.topk_ids is None else len(step.topk_ids)
        control.append({**values, "seq": step.seq, "num_spans": len(step.spans), "rows": num_rows})
    frames = pack("steps", [np.concatenate([step.spans for step in steps])], steps=control)
    with_rows = [step for step in steps if step.topk_ids is not None]
    if with_rows:
        for name in ("topk_ids", "topk_weights"):
            frames.append(np.concatenate([getattr(step, name) for step in with_rows]))
    return frames


def pack_all(steps: Sequence[Step], max_bytes: int = MESSAGE_BYTES) -> list[Frames]:
    """Return the messages of consecutive steps: one, but of a single step as many as it takes."""
    if len(steps) > 1:
        return [pack_steps(steps)]
    return [pack_steps([piece]) for piece in steps[0].pieces(max_bytes)]


def unpack_steps(values: dict[str, Any], frames: Frames, hello: Hello) -> list[Step]:
    """Rebuild the steps of a message; the arrays are views of the frames."""
    spans = np.frombuffer(frames[1], np.int32).reshape(-1, 3)
    rows: dict[str, npt.NDArray[Any]] = {}
    if len(frames) == 4:
        shape = (-1, len(hello.layers), hello.top_k)
        rows["topk_ids"] = np.frombuffer(frames[2], hello.id_dtype).reshape(shape)
        rows["topk_weights"] = np.frombuffer(frames[3], hello.weights_dtype).reshape(shape)
    steps, span, row = [], 0, 0
    for control in values["steps"]:
        num_spans, num_rows = control.pop("num_spans"), control.pop("rows")
        for name in {"admitted", "resumed"} & control.keys():
            control[name] = [Admission(**admission) for admission in control[name]]
        own: dict[str, Any] = {
            name: array[row : row + num_rows] for name, array in rows.items() if num_rows
        }
        steps.append(Step(**control, spans=spans[span : span + num_spans], **own))
        span, row = span + num_spans, row + num_rows
    return steps
