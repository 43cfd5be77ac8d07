"""Sends the requests of a load test and measures each."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence

from moescope.bench.connections import FAILURES, Connections, Target, kind_of
from moescope.bench.measured_request import MeasuredRequest
from moescope.bench.schedule import Pacer
from moescope.bench.stream import EventParser, StreamedResponse
from moescope.bench.workload import PATHS, Conversation, Dialogue, RequestOptions

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When conversations start.

    With ``due_s`` the loop is open: each starts when it is due, whether or not others have ended.
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
    """One run of a load test; its attributes can be read while it goes on.

    Args:
        conversations: What to send.
        options: How every request is sent.
        target: The server.
        pace: When conversations start.
        clock: Seconds from a monotonic clock.

    Attributes:
        requests: Those that have ended, in the order of their ends.
        in_flight: Requests that were sent and have not ended.
        start_s: The clock at the start.
        duration_s: Seconds from the start to the last request's end; 0 until the run has ended.
        cpu_s: CPU seconds of this process during the run.
        interrupted: Requests that were in flight when the run was stopped.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        options: RequestOptions,
        target: Target,
        pace: Pace,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._dialogues = [Dialogue(one, options) for one in conversations]
        self._pace, self._clock = pace, clock
        self._http = Connections(target, PATHS[options.endpoint])
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_request: Callable[[MeasuredRequest], None] | None = None
        self.requests: list[MeasuredRequest] = []
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
        on_request: Callable[[MeasuredRequest], None] | None = None,
    ) -> None:
        """Send all requests and wait for their ends.

        Args:
            stop: When set, requests in flight are given up and the run ends.
            on_request: Called with each request that has ended.
        """
        self._on_request = on_request
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
            request, response = await self._send(number, turn, due_s, queue_s)
            self.requests.append(request)
            if self._on_request:
                self._on_request(request)
            if response is None:
                return
            dialogue.add_response("".join(response.text), response.token_ids)
            due_s, queue_s = self._clock() - self.start_s, 0.0

    async def _send(
        self, number: int, turn: int, due_s: float, queue_s: float
    ) -> tuple[MeasuredRequest, StreamedResponse | None]:
        dialogue, response, error = self._dialogues[number], StreamedResponse(), None
        self.in_flight += 1
        sent_s = self._clock()
        try:
            async with self._http.stream(dialogue.body) as parts:
                events = EventParser()
                async for part in parts:
                    now_s = self._clock()
                    for event in events.feed(part):
                        response.take(event, now_s)
                for event in events.end():
                    response.take(event, self._clock())
            response.require_whole(token_ids=dialogue.needs_token_ids)
        except FAILURES as failure:
            error = failure
        finally:
            self.in_flight -= 1
        ended_s = self._clock() if error else response.chunk_times_s[-1]
        request = MeasuredRequest(
            conversation=number,
            turn=turn,
            due_s=due_s,
            queue_s=queue_s,
            sent_s=sent_s - self.start_s,
            chunk_s=[one - sent_s for one in response.chunk_times_s],
            e2el_s=ended_s - sent_s,
            prompt_tokens=response.prompt_tokens or 0,
            completion_tokens=response.completion_tokens or 0,
            text="".join(response.text),
            token_ids=response.token_ids or None,
            finish_reason=response.finish_reason,
            error_kind=kind_of(error) if error else None,
            error=(str(error) or type(error).__name__) if error else None,
        )
        return request, None if error else response


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """Exclude existing objects from garbage collection: its pauses would be measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
