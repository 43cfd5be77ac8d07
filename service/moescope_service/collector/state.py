"""What the collector knows: written by its messages, read by its replies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from moescope_service.collector.archive_queue import ArchiveQueue
from moescope_service.collector.counters import ExpertCounters
from moescope_service.collector.receipts import Receipts
from moescope_service.collector.routes_log import RoutesLog
from moescope_service.collector.sequences import Sequence, Sequences
from moescope_service.collector.stats import Stats
from moescope_service.collector.steps import Steps
from moescope_service.collector.store import Kept, TraceStore
from moescope_service.collector.windows import CountWindows
from moescope_service.collector.workers import Peer, Workers
from moescope_service.messages import CaptureSpec, Frames, pack
from moescope_service.settings import Settings


class CollectorState:
    """The collector's state, and what is to be sent. For the collector's only thread.

    Args:
        settings: What is kept, and how much.
        clock: Monotonic seconds.
        epoch: How many collectors the deployment had before this one.
    """

    def __init__(
        self, settings: Settings, clock: Callable[[], float] = time.monotonic, *, epoch: int = 0
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.epoch = epoch
        self.spec: CaptureSpec | None = None
        """What the workers capture; None before all of an engine introduced themselves."""
        self.refusal: str | None = None
        """Why the deployment is not to serve, which only its workers together can tell."""
        self.counters: ExpertCounters | None = None
        """None before the workers introduced themselves, as are `windows` and `steps`."""
        self.steps: Steps | None = None
        self.windows: CountWindows | None = None
        self.sequences = Sequences(clock)
        self.store = TraceStore(settings.memory_bytes)
        self.stats = Stats()
        self.log: RoutesLog | None = None
        """The route log, where there is one."""
        self.archive: ArchiveQueue | None = None
        """The way to the archive, where there is one."""
        self.workers = Workers(clock, settings.prefix_bytes)
        self.servers: set[Peer] = set()
        """The API servers."""
        self.receipts = Receipts()
        self.outbox: list[tuple[Peer, Frames]] = []
        """(peer, frames) to be sent."""
        # None: the collector before this one may have ordered a pause, which its workers know.
        self._is_capturing: bool | None = None if epoch else True

    @property
    def is_capturing(self) -> bool:
        """Whether workers are to ship rows; True where only the collector before would know."""
        return self._is_capturing is not False

    def set_capturing(self, on: bool) -> None:
        """Tell every worker to ship rows, or to hold them back."""
        self._is_capturing = on
        self.outbox += [(peer, pack("capture", on=on)) for peer in self.workers]

    def take_over_capturing(self, on: bool) -> None:
        """Let what the collector before had ordered hold, unless this one has ordered already."""
        if self._is_capturing is None:
            self._is_capturing = on

    def find(
        self, request_id: str, owner: str | None = None
    ) -> tuple[Mapping[int, Sequence], Mapping[int, Kept]]:
        """Return what an id finds by uid: running sequences, and finished traces.

        Where it is the id of a response, only what has that response.

        Args:
            request_id: Any id that a client saw.
            owner: Whose the request has to be; None: anyone's.
        """
        running, kept = self.sequences.ids, self.store.ids
        own = running.own(request_id, owner), kept.own(request_id, owner)
        if any(own):
            return own
        return running.any(request_id, owner), kept.any(request_id, owner)

    def forget(self, sequences: Iterable[Sequence]) -> int:
        """Keep no trace of running sequences, nor let the next collector keep one.

        Returns:
            How many of them had not ended.
        """
        internal_ids = []
        for sequence in sequences:
            if sequence.keep:
                self.sequences.discard_ids(sequence)
                internal_ids.append(sequence.register.internal_id)
        forget = pack("forget", internal_ids=internal_ids)
        self.outbox += [(server, forget) for server in self.servers if internal_ids]
        return len(internal_ids)
