"""Runs a load test in the foreground: warm-up, live numbers, Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Sequence

from rich.console import Console

from moescope import replay
from moescope.bench import live
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.workload import Ask, Conversation
from moescope.errors import CommandError


def served_model(target: Target) -> str:
    """Return the name of the first model that the server lists.

    Raises:
        MoescopeError: The server does not answer, or lists none.
    """

    async def ask() -> str:
        async with replay.connect(target.base_url, target.api_key) as http:
            return await replay.served_model(http)

    return asyncio.run(ask())


def run(
    conversations: Sequence[Conversation],
    ask: Ask,
    target: Target,
    pace: Pace,
    *,
    warm_up: Sequence[Conversation] = (),
    console: Console,
) -> Run:
    """Run a load test; Ctrl-C or SIGTERM ends it with what was measured so far.

    Args:
        conversations: What to ask.
        ask: How to ask.
        target: Whom.
        pace: When.
        warm_up: What to ask before, uncounted and as many at a time as the run may have.
        console: Where to show live numbers.

    Raises:
        CommandError: A request of the warm-up failed, or the warm-up was stopped.
    """

    async def go() -> Run:
        stop = asyncio.Event()
        with _stopping(stop):
            if warm_up:
                at_once = min(pace.max_concurrency or len(warm_up), len(warm_up))
                first = Run(warm_up, ask, target, Pace(max_concurrency=at_once))
                await first.go(stop)
                _require_all(first)
            measured = Run(conversations, ask, target, pace)
            async with live.shown(console, measured):
                await measured.go(stop)
        return measured

    return asyncio.run(go())


@contextlib.contextmanager
def _stopping(stop: asyncio.Event) -> Iterator[None]:
    """Set an event on the first Ctrl-C or SIGTERM; the second does what it always does."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _require_all(warm_up: Run) -> None:
    failed = [record for record in warm_up.records if record.error]
    if failed:
        raise CommandError(
            f"{len(failed)} of {warm_up.num_requests} requests of the warm-up failed; the first: "
            f"{failed[0].error}"
        )
    if len(warm_up.records) < warm_up.num_requests:
        raise CommandError("stopped in the warm-up: nothing was measured")
