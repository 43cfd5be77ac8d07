"""What API servers ask the collector, and its replies: the dataclasses, and how they travel.

A query travels as a ``query`` message with a number that its ``reply`` repeats. Arrays of a reply
are ZMQ frames behind its control frame.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Generic, Literal, TypeVar

import msgspec
import numpy as np

from moescope import formats
from moescope.records import LogInfo, SequenceInfo, StoreInfo
from moescope.trace import RouteTrace
from moescope_service.messages import CaptureSpec, Frames, pack

FINISHING_WAIT_S = 2.0
"""How long a `WaitQuery` that names no time waits for a request that was answered already.

The worker's end follows the response by 0 to 2 ms, measured on the CPU and on an H200.
"""
MAX_REPLY_BYTES = 16 * 2**20
"""Bytes of rows in a reply, which takes the collector's thread 5 ms to make."""
MAX_WINDOW_S = 3600.0
"""The longest window of counts that can be asked for, in seconds; big models have less."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the collector replies."""

    arrays: Frames = ()
    """The frames behind the control frame."""


R_co = TypeVar("R_co", bound=Reply, covariant=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Query(Generic[R_co]):
    """What can be asked; each kind names the kind of its reply."""

    reply: ClassVar[type[Reply]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The rows of one request that are asked for."""

    request_id: str
    start: int = 0
    """The first row of each of its traces."""
    uid: int | None = None
    """Of a query that follows: the sequence that it has followed so far, `Found.uid`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one id finds."""

    status: Literal["finished", "running", "evicted", "lost", "unknown"]
    """``lost``: the collector hung, and its API server had to give up the registration."""
    traces: list[int] = dataclasses.field(default_factory=list)
    """Numbers of its traces in the reply: the newest request first, its choices in their order."""
    next_start: int | None = None
    """The first row of those that the reply has no room for; None where it has all."""
    lacks_older: bool = False
    """Whether older requests of the same id are left out."""
    indices: list[int] = dataclasses.field(default_factory=list)
    """Which choices there are, where the one that was asked for is not among them."""
    uid: int | None = None
    """The collector's number of the sequence that is followed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArrayHead:
    """How to read the frame of an array."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TracesReply(Reply):
    """Rows of traces, as the arrays of an ``.npz``."""

    heads: list[ArrayHead] = dataclasses.field(default_factory=list)
    spec: CaptureSpec | None = None

    def traces(self) -> list[RouteTrace]:
        """Return the traces; their arrays are views."""
        if not self.heads:
            return []
        members = {
            head.name: np.frombuffer(frame, head.dtype).reshape(head.shape)
            for head, frame in zip(self.heads, self.arrays, strict=True)
        }
        return formats.traces_of(members)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoutesReply(TracesReply):
    """Rows of requests; each trace once, however many ids find it, in the order of `Found`."""

    found: list[Found]
    """In the order asked."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoutesQuery(Query[RoutesReply]):
    """Asks for rows of traces, as many as fit; answered at once."""

    reply = RoutesReply
    wanted: list[Wanted]
    limit: int | None = None
    """Rows of each trace at most."""
    index: int | None = None
    """Only the choice with this index; None: all."""
    follows: bool = False
    """Whether a running sequence is found too, with its rows so far: of the newest request of an id
    the choice with the index. Where `Wanted.uid` names it, it has no trace unless it has new rows.
    """
    weights_version: int | None = None
    """Rows that other weights computed are missing in the reply; None: all may have."""
    max_staleness: int | None = None
    """By how many changes the weights that computed a row may lag behind the present ones; other
    rows are missing."""
    max_bytes: int = MAX_REPLY_BYTES
    """Bytes of rows at most, but for one row of each trace of the first request."""
    owner: str | None = None
    """Only what this owner's key made is found; None: everything, ``""``: nothing.

    An owner is what `moescope_service.messages.Register.owner` says. What others made does not
    exist for such a query: the reply is that for an id that was never seen.
    """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WaitReply(Reply):
    """All have ended, or the time is up."""

    is_refused: bool = False
    """Whether too many wait already."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WaitQuery(Query[WaitReply]):
    """Waits for the end of requests; ``cancel`` ends the wait without a reply."""

    reply = WaitReply
    request_ids: list[str]
    wait_s: float | None = None
    """Seconds to wait for all of them together; None: `FINISHING_WAIT_S` for those that were
    answered already."""
    owner: str | None = None
    """Only what this owner's key made is waited for; as of `RoutesQuery`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeleteReply(Reply):
    """How many sequences were deleted."""

    deleted: int
    is_own: bool = False
    """Whether the id was that of their response."""
    others: int = 0
    """How many the id finds that another owner made: they stay."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeleteQuery(Query[DeleteReply]):
    """Forgets the traces of a request; a running one will leave none."""

    reply = DeleteReply
    request_id: str
    owner: str | None = None
    """Only what this owner's key made is deleted; as of `RoutesQuery`."""
    own_only: bool = False
    """Whether nothing is deleted but what has the response of that id."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecentReply(Reply):
    """A page of recent sequences, newest first."""

    sequences: list[SequenceInfo]
    next_before: int | None
    """What to give as ``before`` for the next page; None on the last one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecentQuery(Query[RecentReply]):
    """Asks for recent sequences."""

    reply = RecentReply
    limit: int
    before: int | None = None
    owner: str | None = None
    """Only what this owner's key made is listed; as of `RoutesQuery`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerReply(TracesReply):
    """A page of the rows of one layer, without weights: the traces that began last come first."""

    next_before: int | None = None
    """What to give as ``before`` for the next page; None on the last one."""
    next_start: int = 0
    """What to give as ``start``."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuery(Query[LayerReply]):
    """Asks for one layer's rows of finished traces; of a layer that none has there are none."""

    reply = LayerReply
    layer: int
    before: int | None = None
    start: int = 0
    """Rows that are known already of the first trace, where that is still there."""
    owner: str | None = None
    """Only what this owner's key made is read; as of `RoutesQuery`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndedReply(Reply):
    """Sequences that ended since the query before, in that order, and where to go on."""

    sequences: list[SequenceInfo]
    owners: list[str | None]
    """Of each of them, as of `moescope_service.messages.Register`."""
    epoch: int
    number: int
    skipped: int = 0
    """How many are left out: they ended too long ago."""
    has_more: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndedQuery(Query[EndedReply]):
    """Asks which sequences have ended and left a trace."""

    reply = EndedReply
    epoch: int | None = None
    """Of the reply before, as is ``number``; None: only where to go on is asked for."""
    number: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsReply(Reply):
    """Selections, int64 ``[num_phases, num_layers, num_experts]``, in ``arrays[0]``."""

    spec: CaptureSpec | None = None
    """None, with nothing else, before the workers introduced themselves."""
    since_s: float = 0.0
    """Unix time from which they are counted, in seconds."""
    window_s: float | None = None
    """Seconds that they cover; None: all since the last reset."""
    rows: list[int] = dataclasses.field(default_factory=list)
    """Rows counted, by phase."""
    kept_s: float = 0.0
    """The longest window that can be asked for, in seconds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsQuery(Query[ExpertsReply]):
    """Asks for selections since the last reset, or of the last seconds."""

    reply = ExpertsReply
    window_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepsReply(Reply):
    """Figures of the steps since the last reset, as of `collector.steps.StepFigures`.

    ``arrays`` has, engine after engine, steps, tokens, distinct experts and the busiest one's
    tokens.
    """

    spec: CaptureSpec | None = None
    """None, with nothing else, before the workers introduced themselves."""
    since_s: float = 0.0
    """Unix time of the last reset, in seconds."""
    engines: list[int] = dataclasses.field(default_factory=list)
    """Numbers of the engines that have run steps."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepsQuery(Query[StepsReply]):
    """Asks what steps read."""

    reply = StepsReply


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResetQuery(Query[ExpertsReply]):
    """Sets the selections to zero."""

    reply = ExpertsReply


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaptureReply(Reply):
    """Whether rows are captured from here on."""

    capture: Literal["on", "paused"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaptureQuery(Query[CaptureReply]):
    """Pauses or resumes the capture."""

    reply = CaptureReply
    on: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CollectorInfo:
    """What is captured and kept."""

    spec: CaptureSpec | None
    """None before all workers of an engine introduced themselves."""
    workers_complete: bool
    refusal: str | None
    """Why the deployment is not to serve, which its workers can tell only together."""
    capture: Literal["on", "paused"]
    weights_version: int
    """Number of the newest weights that a worker has."""
    started_s: float
    """Unix time, in seconds."""
    epoch: int
    """How many collectors the deployment had before this one."""
    log: LogInfo
    store: StoreInfo


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InfoReply(Reply):
    """The collector's state."""

    info: CollectorInfo


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InfoQuery(Query[InfoReply]):
    """Asks what is captured and kept."""

    reply = InfoReply


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeReply(Reply):
    """What every node has to have as the first one has it, by name."""

    alike: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeQuery(Query[NodeReply]):
    """Asks that, from another node, before it loads the model."""

    reply = NodeReply


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What the steps of an engine have read since the start, by `KINDS`."""

    engine: int
    steps: list[list[int]]
    """By size, ``[num_kinds, num_sizes]``."""
    tokens: list[int]
    histogram: list[list[int]]
    """Layers of steps by distinct experts, ``[num_kinds, num_bounds]``."""
    distinct: list[int]
    """Distinct experts, summed over layers and steps."""
    expert_bytes: list[int]
    """Bytes of the weights of these."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveFigures:
    """What the archive's process says of its files."""

    files: int = 0
    bytes: int = 0
    is_failing: bool = False
    """Whether it cannot write."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveInfo:
    """What became of the traces that the collector had for the archive."""

    archived: int
    """Traces in published files."""
    waiting: int
    """Traces that are not published yet."""
    dropped: dict[str, int]
    """Traces that were left out, by cause."""
    figures: ArchiveFigures | None
    """None while no process of the archive is there."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MetricsReply(Reply):
    """All counters; see `moescope_service.collector.stats.Stats` for those of that name.

    Selections since the start and in the window of the load balance metrics, int64 ``[num_phases,
    num_layers, num_experts]`` each, in ``arrays``: none before the workers introduced themselves.
    """

    info: CollectorInfo
    steps: int = 0
    rows_captured: int = 0
    rows_lost: dict[str, int] = dataclasses.field(default_factory=dict)
    hook_s: float = 0.0
    traces: dict[str, int] = dataclasses.field(default_factory=dict)
    trace_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    missing: dict[str, int] = dataclasses.field(default_factory=dict)
    incomplete: dict[str, int] = dataclasses.field(default_factory=dict)
    stale: int = 0
    lag_s: float = 0.0
    running: int = 0
    """Registered sequences that have no trace yet."""
    running_bytes: int = 0
    prefix_bytes: int = 0
    """Memory of these, and of ended rows that no API server asked for yet."""
    registrations_lost: int = 0
    """Sequences whose API server gave up what it had to tell of them."""
    links_refused: int = 0
    """Connections of other nodes that were refused: another key, or none."""
    errors: int = 0
    """Messages, replies and traces that failed in the collector and were left out."""
    gaps: int = 0
    """Times that a worker's steps were lost altogether."""
    unclaimed: int = 0
    """Ended sequences that no API server asked for."""
    rows: list[int] = dataclasses.field(default_factory=list)
    """Rows since the start, by phase."""
    window_rows: list[int] = dataclasses.field(default_factory=list)
    """Rows in the window, by phase."""
    archive: ArchiveInfo | None = None
    """None where there is none."""
    read: list[StepMetrics] = dataclasses.field(default_factory=list)
    """Of each engine that has run steps; none where experts are only counted."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MetricsQuery(Query[MetricsReply]):
    """Asks for everything that ``/metrics`` shows."""

    reply = MetricsReply


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SettleReply(Reply):
    """How many answered requests still have no trace."""

    unsettled: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SettleQuery(Query[SettleReply]):
    """Waits for the traces of all requests that were answered already."""

    reply = SettleReply
    wait_s: float


_KINDS: dict[str, type[Query[Any]]] = {
    "routes": RoutesQuery,
    "wait": WaitQuery,
    "delete": DeleteQuery,
    "recent": RecentQuery,
    "layer": LayerQuery,
    "ended": EndedQuery,
    "experts": ExpertsQuery,
    "steps": StepsQuery,
    "reset": ResetQuery,
    "capture": CaptureQuery,
    "info": InfoQuery,
    "node": NodeQuery,
    "metrics": MetricsQuery,
    "settle": SettleQuery,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def pack_query(number: int, query: Query[Any]) -> list[Any]:
    """Return the frames of a query.

    Args:
        number: Comes back with the reply.
        query: What is asked.
    """
    return pack("query", number=number, query=_NAMES[type(query)], values=query)


def unpack_query(values: dict[str, Any]) -> tuple[int, Query[Any]]:
    """Return the number and the query of a message's control values.

    Raises:
        ValueError: They are no query.
    """
    kind = _KINDS.get(values["query"])
    if kind is None:
        raise ValueError(f"unknown query {values['query']!r}: expected one of {', '.join(_KINDS)}")
    return values["number"], msgspec.convert(values["values"], kind)


def pack_cancel(number: int) -> list[Any]:
    """Return the frames that take a query back: nobody waits for its reply any more."""
    return pack("cancel", number=number)


def pack_reply(number: int, reply: Reply) -> list[Any]:
    """Return the frames of a reply to the query of that number."""
    names = [field.name for field in dataclasses.fields(reply) if field.name != "arrays"]
    values = {name: getattr(reply, name) for name in names}
    return pack("reply", reply.arrays, number=number, values=values)


def unpack_reply(kind: type[Reply], values: dict[str, Any], frames: Frames) -> Reply:
    """Return a reply of its message's control values and frames.

    Raises:
        ValueError: They are no reply of that kind.
    """
    reply = msgspec.convert(values["values"], kind)
    return dataclasses.replace(reply, arrays=frames[1:])
