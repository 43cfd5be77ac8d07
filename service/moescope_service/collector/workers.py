"""The workers of a deployment: pipeline stages of data-parallel engines.

Every stage routes layers of its own for all sequences of its engine, so a sequence has ended when
all stages have said so, and its rows are theirs side by side. Engines route the same layers for
sequences of their own.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moescope.trace import Source
from moescope.version_runs import MIXED
from moescope_service.collector.clocks import SenderClock
from moescope_service.collector.reassembly import Reassembler
from moescope_service.collector.rows import CAUSES, Rows
from moescope_service.messages import CaptureSpec, WorkerState
from moescope_service.processes import Process

Peer = bytes
"""ZMQ identity of a worker or an API server."""

STAGE_TIMEOUT_S = 60.0
"""How long the end of a sequence that one stage has told waits for the other stages."""


def merged_spec(specs: Sequence[CaptureSpec]) -> CaptureSpec:
    """Return what the stages of an engine capture together.

    Args:
        specs: One a stage, at least one.
    """
    expert_bytes = {
        layer: size
        for spec in specs
        for layer, size in zip(spec.layers, spec.expert_bytes, strict=False)
    }
    layers = sorted(layer for spec in specs for layer in spec.layers)
    return dataclasses.replace(
        specs[0],
        layers=layers,
        expert_bytes=[expert_bytes.get(layer, 0) for layer in layers] if expert_bytes else [],
        router_types=sorted({name for spec in specs for name in spec.router_types}),
    )


def merged_rows(parts: Sequence[Rows]) -> Rows:
    """Return the rows of a sequence of what each stage has of them.

    A row that a stage lacks is missing: the cause is that of the first such stage. One that stages
    computed by different weights is `MIXED`.
    """
    if len(parts) == 1:
        return parts[0]
    num_rows = max(len(part.source) for part in parts)
    parts = [part.resized(num_rows) for part in parts]
    order = np.argsort([layer for part in parts for layer in part.layers])
    source, cause = parts[0].source, parts[0].cause
    version = parts[0].weights_version
    for part in parts[1:]:
        cause = np.where(source == Source.MISSING, cause, part.cause)
        is_missing = (source == Source.MISSING) | (part.source == Source.MISSING)
        source = np.maximum(source, part.source)
        source[is_missing] = Source.MISSING
        version = np.where(version == part.weights_version, version, np.int32(MIXED))
    return dataclasses.replace(
        parts[0],
        layers=sorted(layer for part in parts for layer in part.layers),
        topk_ids=np.concatenate([part.topk_ids for part in parts], 1)[:, order],
        topk_weights=np.concatenate([part.topk_weights for part in parts], 1)[:, order],
        source=source,
        cause=cause,
        weights_version=version,
        cached_len=max(part.cached_len for part in parts),
        cause_beyond=max(part.cause_beyond for part in parts),
    )


@dataclasses.dataclass(slots=True)
class Ended:
    """A sequence that some stages have told the end of."""

    parts: dict[int, Rows]
    """By stage."""
    deadline_s: float


class Engine:
    """The stages of one data-parallel engine."""

    def __init__(self) -> None:
        self.stages: dict[int, tuple[Peer, Reassembler]] = {}
        self.ended: dict[str, Ended] = {}

    @property
    def specs(self) -> list[CaptureSpec]:
        """What the stages capture that are here, in their order."""
        return [worker.spec for _, (_, worker) in sorted(self.stages.items())]

    @property
    def is_complete(self) -> bool:
        """Whether every stage is here."""
        return bool(self.stages) and len(self.stages) == self.specs[0].num_stages

    @property
    def routing_stages(self) -> list[int]:
        """The stages that have layers with experts."""
        return sorted(stage for stage, (_, one) in self.stages.items() if one.spec.layers)


class Workers:
    """Who captures, and what they have of sequences that are ending.

    Args:
        clock: Monotonic seconds.
        prefix_bytes: As of `Reassembler`, of all together.
    """

    def __init__(self, clock: Callable[[], float], prefix_bytes: int = 0) -> None:
        self._clock = clock
        self._prefix_bytes = prefix_bytes
        self._engines: dict[int, Engine] = {}
        self._by_peer: dict[Peer, Reassembler] = {}
        self._process: dict[Peer, Process] = {}
        self._sender_clock: dict[Peer, SenderClock] = {}
        self._gaps_of_replaced = 0

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._by_peer)

    def get(self, peer: Peer) -> Reassembler | None:
        """Return what follows a worker; None where the peer never introduced itself."""
        return self._by_peer.get(peer)

    def age_s(self, peer: Peer, sent_s: float) -> float:
        """Return how many seconds ago a worker made a message; its clock may be another one."""
        return self._sender_clock[peer].age_s(sent_s, time.time())

    @property
    def spec(self) -> CaptureSpec | None:
        """What the deployment captures; None until an engine's stages introduced themselves."""
        for engine in self._engines.values():
            if engine.is_complete:
                return merged_spec(engine.specs)
        return None

    @property
    def are_complete(self) -> bool:
        """Whether every stage of every engine has introduced itself."""
        engines = list(self._engines.values())
        return (
            bool(engines)
            and all(engine.is_complete for engine in engines)
            and len(engines) == engines[0].specs[0].num_engines
        )

    @property
    def size_bytes(self) -> int:
        """Memory of rows whose blocks have left the KV cache."""
        return sum(worker.prefixes.size_bytes for worker in self._by_peer.values())

    @property
    def num_gaps(self) -> int:
        """Times that a worker's steps were lost altogether, and its running routes with them."""
        return self._gaps_of_replaced + sum(worker.gaps for worker in self._by_peer.values())

    @property
    def weights_version(self) -> int:
        """Number of the newest weights that a worker has."""
        return max((worker.weights_version for worker in self._by_peer.values()), default=0)

    def fits(self, spec: CaptureSpec) -> bool:
        """Whether a worker can be part of the model that the others capture."""
        for engine in self._engines.values():
            for other in engine.specs:
                if (spec.num_experts, spec.top_k) != (other.num_experts, other.top_k):
                    return False
                if spec.stage == other.stage and spec.layers != other.layers:
                    return False
                if spec.stage != other.stage and set(spec.layers) & set(other.layers):
                    return False
        return True

    def rival(self, spec: CaptureSpec, process: Process | None) -> Process | None:
        """Return the running process that has a worker's place; None: no other one has it.

        Args:
            spec: What the worker captures; its engine and its stage are its place.
            process: The worker's process. It may come again, on another connection, and another
                process may take the place of one that has ended.
        """
        engine = self._engines.get(spec.engine)
        if engine is None or spec.stage not in engine.stages:
            return None
        peer, _ = engine.stages[spec.stage]
        other = self._process.get(peer)
        return other if other is not None and other != process and other.is_alive else None

    def add(
        self,
        peer: Peer,
        spec: CaptureSpec,
        worker_state: WorkerState | None,
        process: Process | None = None,
    ) -> Reassembler:
        """Follow a worker, in the place of the one that it was before, if any.

        Another process counts the changes of its weights from 0 again, and nobody knows whether it
        began with those that the one before it had: its numbers go on behind that one's.
        """
        prefix_bytes = self._prefix_bytes // (spec.num_engines * spec.num_stages)
        first = self._first_weights_version(spec, process)
        engine = self._engines.setdefault(spec.engine, Engine())
        cause = "link_broken" if spec.stage in engine.stages else "restart"
        # Of what makes no sense: nothing.
        worker = Reassembler(spec, worker_state, prefix_bytes, first, cause)
        if spec.stage in engine.stages:  # it comes again, on another connection
            other, before = engine.stages[spec.stage]
            are_lost = worker_state is not None and worker_state.next_step != before.next_step
            self._gaps_of_replaced += before.gaps + are_lost
            del self._by_peer[other], self._sender_clock[other]
            self._process.pop(other, None)
        engine.stages[spec.stage] = peer, worker
        self._by_peer[peer] = worker
        self._sender_clock[peer] = SenderClock(is_ours=process is None or process.is_here)
        if process is not None:
            self._process[peer] = process
        return worker

    def _first_weights_version(self, spec: CaptureSpec, process: Process | None) -> int:
        engine = self._engines.get(spec.engine)
        if engine is None or spec.stage not in engine.stages:
            return 0
        peer, before = engine.stages[spec.stage]
        is_same = self._process.get(peer) == process
        return before.first_weights_version if is_same else before.weights_version + 1

    def is_first(self, worker: Reassembler) -> bool:
        """Whether a worker is the first of its engine that routes: it alone counts the rows."""
        return worker.spec.stage == self._engines[worker.spec.engine].routing_stages[0]

    def end(self, worker: Reassembler, internal_id: str, rows: Rows) -> Rows | None:
        """Take in that a stage has seen a sequence end.

        Returns:
            The sequence's rows, once every stage that routes has told its own.
        """
        engine, stage = self._engines[worker.spec.engine], worker.spec.stage
        if worker.spec.num_stages == 1:
            return rows
        ended = engine.ended.get(internal_id)
        if ended is None:
            ended = engine.ended[internal_id] = Ended({}, self._clock() + STAGE_TIMEOUT_S)
        ended.parts.setdefault(stage, rows)  # it may tell it again, on another connection
        if not engine.is_complete or len(ended.parts) < len(engine.routing_stages):
            return None
        del engine.ended[internal_id]
        return merged_rows([part for _, part in sorted(ended.parts.items())])

    def so_far(self, internal_id: str, start: int, max_rows: int) -> tuple[Rows, int] | None:
        """Return rows of a running sequence that all stages have settled, and how many those are.

        Args:
            internal_id: Of the sequence.
            start: Position of the first row.
            max_rows: How many at most.

        Returns:
            The rows, and how many there are from position 0 on; None where there are none.
        """
        for engine in self._engines.values():
            workers = [engine.stages[stage][1] for stage in engine.routing_stages]
            num_settled = min((one.num_settled(internal_id) for one in workers), default=0)
            if num_settled and engine.is_complete:
                start = min(start, num_settled)
                end = min(start + max_rows, num_settled)
                parts = [worker.rows_so_far(internal_id, start, end) for worker in workers]
                num_rows = min(len(part.source) for part in parts)
                return merged_rows([part.resized(num_rows) for part in parts]), num_settled
        return None

    def overdue(self) -> Iterator[tuple[str, Rows]]:
        """Yield (internal id, rows) of sequences whose other stages have not told in time."""
        now_s = self._clock()
        for engine in self._engines.values():
            late = [name for name, ended in engine.ended.items() if ended.deadline_s <= now_s]
            for internal_id in late:
                told = engine.ended.pop(internal_id).parts
                parts = [
                    told.get(spec.stage, Rows.nothing(spec, CAUSES["unknown"]))
                    for spec in engine.specs
                    if spec.layers
                ]
                yield internal_id, merged_rows(parts)
