"""Work that Ctrl-C ends early without losing what is done."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def until_signal(work: Coroutine[Any, Any, None]) -> int | None:
    """Run work to its end, or until Ctrl-C, SIGTERM or SIGHUP cancels it. In the main thread.

    Returns:
        The signal's number; None where the work ended by itself.
    """
    loop, task = asyncio.get_running_loop(), asyncio.create_task(work)
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}  # nohup
    for number in before:
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not received:
            raise
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler or signal.SIG_DFL)
    return received[0] if received and task.cancelled() else None
