"""Messages between workers, API servers and the collector.

A message is a list of ZMQ frames: a JSON control frame, then the arrays as raw bytes. Where too
much waits, rows are dropped and control is not: a step whose rows could not be shipped names the
cause in ``lost``, and its spans say which rows those are. Whole steps are given up only where the
collector hangs for long (`moescope_service.link`): by the gap in the step numbers worker and
collector know that handles and blocks of before do not hold any more, and the next message that is
sent names the sequences that ended in the gap.
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
"""Most bytes of rows in one message: ZMQ bounds its queues by messages, not by bytes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """What a worker captures, or the stages of an engine together: layers, experts, dtypes.

    Every connection of a worker begins with it.
    """

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
    """False where a KV connector fills blocks without a word to the worker."""
    model: str
    device: str
    seed: int | None
    versions: dict[str, str]
    expert_bytes: list[int] = dataclasses.field(default_factory=list)
    """Bytes of the weights of one expert of each of ``layers``, whole, however many workers share
    it; 0 where they are not known. Empty: none are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """A sequence that starts to run, or runs again after a preemption."""

    handle: int
    """The worker's small integer for the sequence, reused after its end."""
    internal_id: str
    """The engine's internal request id, as of `moescope_service.ids.short_id`."""
    prompt_len: int
    num_cached: int
    """Tokens whose KV-cache entries were found in the prefix cache."""
    block_ids: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Ongoing:
    """A sequence that runs while its worker introduces itself to a new collector."""

    admission: Admission
    """With the blocks up to the first that went to another sequence; ``num_cached`` as when it was
    first admitted."""
    num_rows: int
    """Positions routed so far; only the collector before this one had their rows."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """Where a worker stands when it introduces itself to a collector that saw none of its steps."""

    next_step: int
    """Number of the step that follows."""
    ongoing: list[Ongoing]
    ended: list[str]
    """Internal ids of the last sequences that ended: this collector was not told of their end."""
    weights_version: int = 0
    """How often its weights have changed."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Step:
    """One engine step of one worker: control, and the rows it routed."""

    number: int
    """Number of the step, from 0 without gaps."""
    time_s: float = 0.0
    """Unix time of the capture, in seconds."""
    hook_s: float = 0.0
    """Seconds that the capture spent on the worker's thread since the step before."""
    finished: list[int] = dataclasses.field(default_factory=list)
    """Handles of sequences that ended; processed before everything else."""
    finished_unseen: list[str] = dataclasses.field(default_factory=list)
    """Internal ids of sequences that ended before they were ever scheduled."""
    admitted: list[Admission] = dataclasses.field(default_factory=list)
    resumed: list[Admission] = dataclasses.field(default_factory=list)
    grown: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)
    """(handle, newly allocated block ids)."""
    loaded: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """(block id, key of its prefix) of newly allocated blocks that a KV connector fills; no
    sequence need have them yet."""
    filled: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """(block id, key of its prefix) of blocks that are full with this step."""
    block_copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(source block, destination block), copied before the step's rows are written."""
    part: int = 0
    """Number of the piece, where the step was too large for one message; see `pieces`."""
    has_more: bool = False
    """Whether another piece follows."""
    weights_version: int = 0
    """Which weights computed its rows: how often the worker's had changed since its start, or
    `moescope.version_runs.MIXED`. Where a step has no rows, how often they have, or 0."""
    lost: str | None = None
    """Where its rows were not shipped, one of `moescope_service.causes.LOST_CAUSES`."""
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
        """Yield the step, cut where its rows have more bytes; control goes with the first piece."""
        if self.topk_ids is None or self.topk_weights is None or self.rows_bytes <= max_bytes:
            yield self
            return
        num_rows = len(self.topk_ids)
        size = max(1, max_bytes * num_rows // self.rows_bytes)
        ends = np.cumsum(self.spans[:, 2])
        starts = ends - self.spans[:, 2]
        further = Step(
            number=self.number,
            time_s=self.time_s,
            weights_version=self.weights_version,
            spans=self.spans,
        )
        for part, first in enumerate(range(0, num_rows, size)):
            last = min(first + size, num_rows)
            here = (starts < last) & (ends > first)
            spans = self.spans[here]
            spans[:, 1] += np.maximum(first - starts[here], 0)
            spans[:, 2] = np.minimum(ends[here], last) - np.maximum(starts[here], first)
            yield dataclasses.replace(
                self if part == 0 else further,
                part=part,
                has_more=last < num_rows,
                spans=spans,
                topk_ids=self.topk_ids[first:last],
                topk_weights=self.topk_weights[first:last],
            )


class RequestKey(NamedTuple):
    """Identifies a request: all choices of all its prompts share it, and no other request has it.

    The id alone is not enough: a client may give several requests the same ``X-Request-Id``.
    """

    request_id: str
    created_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """Which ids a client sees for one sequence of the engine; sent by an API server."""

    internal_id: str
    request_id: str
    """The id in the response; as the other ids, shortened by `moescope_service.ids.short_id`."""
    ids: list[str]
    """Every id that finds the sequence."""
    index: int
    model: str
    lora: str | None
    prompt_len: int
    created_s: float
    keep: bool
    """False where the request opted out: its trace is not kept."""
    owner: str | None = None
    """Whose API key made the request, as a keyed hash; None where none of the server's keys did."""


def pack(kind: str, arrays: Frames = (), **fields: Any) -> list[Any]:
    """Return the frames of a message.

    Args:
        kind: ``spec``, ``steps``, ``server``, ``register``, ``query``, ``reply`` …
        arrays: Frames behind the control frame, contiguous.
        fields: The control frame's values.
    """
    return [orjson.dumps({"kind": kind, **fields}), *arrays]


def pack_introduction(
    spec: CaptureSpec,
    *,
    is_capturing: bool = True,
    worker_state: WorkerState | None = None,
    process: str = "",
) -> list[Any]:
    """Return the frames with which a worker introduces itself.

    Args:
        spec: What it captures.
        is_capturing: Whether it captures now; False after a collector's order to pause.
        worker_state: Where it stands; None where no step has run.
        process: Which process it is, a `moescope_service.processes.Process` as text: one that comes
            again on another connection is told from a second one.
    """
    stands = None if worker_state is None else dataclasses.asdict(worker_state)
    return pack(
        "worker",
        **dataclasses.asdict(spec),
        is_capturing=is_capturing,
        worker_state=stands,
        process=process,
    )


def unpack_introduction(
    values: dict[str, Any],
) -> tuple[CaptureSpec, bool, WorkerState | None, str]:
    """Return what `pack_introduction` took, in that order."""
    is_capturing, worker_state = values.pop("is_capturing"), values.pop("worker_state")
    process = values.pop("process")
    if worker_state is not None:
        ongoing = [
            Ongoing(Admission(**one["admission"]), one["num_rows"])
            for one in worker_state["ongoing"]
        ]
        worker_state = WorkerState(**{**worker_state, "ongoing": ongoing})
    return CaptureSpec(**values), is_capturing, worker_state, process


def unpack(frames: Frames) -> tuple[str, dict[str, Any]]:
    """Return the kind of a message and its control values.

    Raises:
        ValueError: The first frame is not a control frame.
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
        control.append(
            {**values, "number": step.number, "num_spans": len(step.spans), "rows": num_rows}
        )
    frames = pack("steps", [np.concatenate([step.spans for step in steps])], steps=control)
    with_rows = [step for step in steps if step.topk_ids is not None]
    if with_rows:
        for name in ("topk_ids", "topk_weights"):
            frames.append(np.concatenate([getattr(step, name) for step in with_rows]))
    return frames


def pack_all(steps: Sequence[Step], max_bytes: int = MESSAGE_BYTES) -> list[Frames]:
    """Return the messages of consecutive steps: one, or the pieces of a single large step."""
    if len(steps) > 1:
        return [pack_steps(steps)]
    return [pack_steps([piece]) for piece in steps[0].pieces(max_bytes)]


def unpack_steps(values: dict[str, Any], frames: Frames, spec: CaptureSpec) -> list[Step]:
    """Rebuild the steps of a message; the arrays are views of the frames."""
    spans = np.frombuffer(frames[1], np.int32).reshape(-1, 3)
    rows: dict[str, npt.NDArray[Any]] = {}
    if len(frames) == 4:
        shape = (-1, len(spec.layers), spec.top_k)
        rows["topk_ids"] = np.frombuffer(frames[2], spec.id_dtype).reshape(shape)
        rows["topk_weights"] = np.frombuffer(frames[3], spec.weights_dtype).reshape(shape)
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
