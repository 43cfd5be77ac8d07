"""Sends the requests of a load test and keeps a record of each."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence

from moescope.bench.connections import FAILURES, Connections, Target, kind_of
from moescope.bench.record import Record
from moescope.bench.schedule import Pacer
from moescope.bench.stream import Answer, EventParser
from moescope.bench.workload import PATHS, Ask, Conversation, Dialogue

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When conversations start.

    With ``due_s`` the loop is open: each starts when it is due, whatever became of the others.
    Without, it is closed: ``max_concurrency`` of them go on at a time.
    """

    max_concurrency: int | None = None
    """Conversations, and so requests, in flight at most; an open loop needs none."""
    due_s: Sequence[float] | None = None
    """Seconds from the start at which each conversation begins; see `schedule.due_times`."""

    def __post_init__(self) -> None:
        if self.due_s is None and self.max_concurrency is None:
            raise ValueError("a closed loop needs max_concurrency")


class Run:
    """One run of a load test; what was measured is there while it goes on.

    Args:
        conversations: What to ask.
        ask: How to ask.
        target: Whom.
        pace: When.
        clock: Seconds from a monotonic clock.

    Attributes:
        records: One a request that has ended, in the order of their ends.
        in_flight: Requests that were sent and have not ended.
        start_s: The clock at the start.
        duration_s: Seconds from the start to the last request's end; 0 until the run has ended.
        cpu_s: CPU seconds of this process meanwhile.
        interrupted: Requests that were in flight when the run was stopped.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        ask: Ask,
        target: Target,
        pace: Pace,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._dialogues = [Dialogue(one, ask) for one in conversations]
        self._pace, self._clock = pace, clock
        self._http = Connections(target, PATHS[ask.endpoint])
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_record: Callable[[Record], None] | None = None
        self.records: list[Record] = []
        self.in_flight = 0
        self.start_s = self.duration_s = self.cpu_s = 0.0
        self.interrupted = 0

    @property
    def num_requests(self) -> int:
        """Requests that the whole run is."""
        return sum(len(dialogue.turns) for dialogue in self._dialogues)

    async def go(
        self,
        stop: asyncio.Event | None = None,
        on_record: Callable[[Record], None] | None = None,
    ) -> None:
        """Send all requests and wait for their ends.

        Args:
            stop: When set, what is in flight is given up and the run ends.
            on_record: Called with each record.
        """
        self._on_record = on_record
        await self._http.warm_up()
        waiter = asyncio.create_task((stop or asyncio.Event()).wait())
        with _frozen_heap():
            self.start_s, cpu_start_s = self._clock(), time.process_time()
            due_s = self._pace.due_s
            run = asyncio.create_task(self._closed() if due_s is None else self._open(due_s))
            try:
                await asyncio.wait((run, waiter), return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.cpu_s = time.process_time() - cpu_start_s
                waiter.cancel()
                await self._end(run)

    async def _end(self, run: asyncio.Task[None]) -> None:
        self.duration_s = self._clock() - self.start_s
        stopped = not run.done()
        self.interrupted = self.in_flight if stopped else 0
        run.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(run, *self._tasks, return_exceptions=True)
        await self._http.aclose()
        if not stopped:
            run.result()

    async def _closed(self) -> None:
        waiting = iter(range(len(self._dialogues)))

        async def user() -> None:
            for number in waiting:
                await self._converse(number, self._clock() - self.start_s)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._pace.max_concurrency or 1, len(self._dialogues))):
                group.create_task(user())

    async def _open(self, due_s: Sequence[float]) -> None:
        all_arrived = asyncio.Event()
        slots = asyncio.Semaphore(self._pace.max_concurrency or len(self._dialogues))

        async def converse(number: int, woken_s: float) -> None:
            async with slots:
                queue_s = self._clock() - self.start_s - woken_s
                await self._converse(number, due_s[number], queue_s)

        def arrive(number: int) -> None:
            task = asyncio.create_task(converse(number, self._clock() - self.start_s))
            self._tasks.add(task)
            if number + 1 == len(self._dialogues):
                all_arrived.set()

        with Pacer(due_s, self.start_s, arrive, self._clock):
            await all_arrived.wait()
        await asyncio.gather(*self._tasks)

    async def _converse(self, number: int, due_s: float, queue_s: float = 0.0) -> None:
        dialogue = self._dialogues[number]
        for turn in range(len(dialogue.turns)):
            record, answer = await self._ask(number, turn, due_s, queue_s)
            self.records.append(record)
            if self._on_record:
                self._on_record(record)
            if answer is None:
                return
            dialogue.answered("".join(answer.text), answer.token_ids)
            due_s, queue_s = self._clock() - self.start_s, 0.0

    async def _ask(
        self, number: int, turn: int, due_s: float, queue_s: float
    ) -> tuple[Record, Answer | None]:
        dialogue, answer, error = self._dialogues[number], Answer(), None
        self.in_flight += 1
        sent_s = self._clock()
        try:
            async with self._http.stream(dialogue.body) as parts:
                events = EventParser()
                async for part in parts:
                    now_s = self._clock()
                    for data in events.feed(part):
                        answer.take(data, now_s)
            answer.require_whole(token_ids=dialogue.needs_token_ids)
        except FAILURES as failure:
            error = failure
        finally:
            self.in_flight -= 1
        ended_s = self._clock() if error else answer.chunk_times_s[-1]
        record = Record(
            conversation=number,
            turn=turn,
            due_s=due_s,
            queue_s=queue_s,
            sent_s=sent_s - self.start_s,
            chunk_s=[one - sent_s for one in answer.chunk_times_s],
            e2el_s=ended_s - sent_s,
            prompt_tokens=answer.prompt_tokens or 0,
            completion_tokens=answer.completion_tokens or 0,
            text="".join(answer.text),
            token_ids=answer.token_ids or None,
            finish_reason=answer.finish_reason,
            error_kind=kind_of(error) if error else None,
            error=(str(error) or type(error).__name__) if error else None,
        )
        return record, None if error else answer


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keep the garbage collector away from what is there already: its pauses would be measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
