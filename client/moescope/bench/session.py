"""Runs a load test in the foreground: warm-up, live numbers, Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
from collections.abc import Iterator, Sequence

from rich.console import Console

from moescope import http
from moescope.bench import live
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.workload import Conversation, RequestOptions
from moescope.errors import CommandError, StoppedError


def served_model(target: Target, wanted: str | None = None) -> str:
    """Return the name of the model to ask for.

    Args:
        target: The server.
        wanted: The name, which the server has to list; the first that it lists where None.

    Raises:
        MoescopeError: The server does not respond, lists none, or does not serve the wanted one.
    """
    with http.connect(
        target.base_url, target.api_key, target.timeout_s, verify=target.verify
    ) as client:
        return http.served_model(client.get("/v1/models"), wanted)


def run(
    conversations: Sequence[Conversation],
    options: RequestOptions,
    target: Target,
    pace: Pace,
    *,
    warm_up: Sequence[Conversation] = (),
    console: Console,
) -> tuple[Run, signal.Signals | None]:
    """Run a load test; Ctrl-C or SIGTERM ends it with what was measured so far.

    Args:
        conversations: What to send.
        options: How every request is sent.
        target: The server.
        pace: When conversations start.
        warm_up: What to send before, not counted; as many at a time as in the run.
        console: Where to show live numbers.

    Returns:
        The run, and the signal that ended it, if one did.

    Raises:
        CommandError: A request of the warm-up failed.
        StoppedError: A signal ended the warm-up.
    """

    async def go() -> tuple[Run, signal.Signals | None]:
        with _signals() as stop:
            if warm_up:
                at_once = min(pace.max_concurrency or len(warm_up), len(warm_up))
                first = Run(warm_up, options, target, Pace(max_concurrency=at_once))
                await first.go(stop.event)
                _require_all(first, stop.by)
            measured = Run(conversations, options, target, pace)
            async with live.shown(console, measured):
                await measured.go(stop.event)
        return measured, stop.by

    return asyncio.run(go())


@dataclasses.dataclass(slots=True)
class _Stop:
    """Whether a signal has arrived, and which."""

    event: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    by: signal.Signals | None = None


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Take the first Ctrl-C or SIGTERM; the second does what it always does."""
    loop, stop = asyncio.get_running_loop(), _Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def on_signal(number: signal.Signals) -> None:
        stop.by = number
        stop.event.set()
        for one in numbers:
            loop.remove_signal_handler(one)

    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _require_all(warm_up: Run, stopped_by: signal.Signals | None) -> None:
    failed = [request for request in warm_up.requests if request.error]
    if failed:
        raise CommandError(
            f"{len(failed)} of {warm_up.num_requests} requests of the warm-up failed; the first: "
            f"{failed[0].error}"
        )
    if stopped_by:
        raise StoppedError("stopped in the warm-up: nothing was measured", stopped_by)
