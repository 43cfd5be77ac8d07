"""The steps of a run; each fills its files in the run directory and shows its progress."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console

from moescope import _service, progress, replay, routes_log, servers, timing
from moescope._client import Client
from moescope.errors import CommandError
from moescope.run_dir import RunDir


def replay_prompts(
    run_dir: RunDir,
    prompts: Sequence[str],
    *,
    base_url: str,
    api_key: str | None,
    options: replay.Options,
    console: Console,
) -> list[replay.Response]:
    """Replay prompts and write the responses; failed requests are among them.

    Raises:
        MoescopeError: The server does not answer at all.
    """

    async def run() -> list[replay.Response]:
        with progress.bar(console, "replay", len(prompts)) as advance:
            async with replay.connect(base_url, api_key) as http:
                return await replay.replay(prompts, http, options, lambda _: advance())

    responses = asyncio.run(run())
    replay.write_responses(run_dir.responses, responses)
    tokens = sum(response.completion_tokens for response in responses)
    console.print(f"{len(responses)} responses, {tokens:,} completion tokens: {run_dir.responses}")
    return responses


def fetch_routes(
    run_dir: RunDir,
    responses: Sequence[replay.Response],
    *,
    base_url: str,
    api_key: str | None,
    layers: str | None,
    console: Console,
) -> None:
    """Fetch the routes of all responses and write them as a route log.

    Raises:
        CommandError: Routes of a request are not to be had; the log holds all others.
        MoescopeError: The server does not answer at all.
    """
    request_ids = [response.request_id for response in responses if response.request_id]
    with (
        progress.bar(console, "routes", len(request_ids)) as advance,
        Client(base_url, api_key) as client,
    ):
        fetched = routes_log.fetch(client, request_ids, run_dir.routes, layers, advance)
    console.print(
        f"routes of {fetched.sequences} sequences, {fetched.rows:,} rows, "
        f"{fetched.missing_rows:,} of them missing: {run_dir.routes}"
    )
    if fetched.failed:
        request_id, reason = next(iter(fetched.failed.items()))
        raise CommandError(
            f"no routes for {len(fetched.failed)} of {len(request_ids)} requests; "
            f"{request_id}: {reason}"
        )


@contextlib.contextmanager
def started(
    run_dir: RunDir,
    *,
    model: str | None,
    args: Sequence[str],
    api_key: str | None,
    timeout_s: float,
    console: Console,
    env: Mapping[str, str] = os.environ,
) -> Iterator[timing.Arms]:
    """Start a server with capture and one without; end them afterwards.

    Args:
        run_dir: Where their logs go.
        model: The model's path or name; the bundled one where None.
        args: Further flags of vLLM, for both.
        api_key: The key that both want, if any.
        timeout_s: Seconds to wait until both are ready.
        console: Where to tell what happens.
        env: Their environment.

    Raises:
        CommandError: vLLM is not installed, or a server does not start.
    """
    _service.require("moescope_service", "vllm")
    path, name = (model, model) if model else (_service.bundled_model(), _service.DEMO_MODEL)
    start_s = time.monotonic()
    console.print("starting vLLM twice, with and without moescope; this takes a minute or two")
    with servers.pair(path, name, args, run_dir, timeout_s=timeout_s, env=env) as pair:
        console.print(f"both ready after {time.monotonic() - start_s:.0f} s")
        yield timing.Arms(
            captured_url=pair.captured.url,
            stock_url=pair.stock.url,
            api_key=api_key,
            commands=pair.commands,
        )


def measure_overhead(
    run_dir: RunDir,
    prompts: Sequence[str],
    *,
    arms: timing.Arms,
    options: replay.Options,
    rounds: int,
    console: Console,
) -> None:
    """Measure what the capture costs and write timing.json.

    Raises:
        MoescopeError: See `timing.run`.
    """
    with progress.bar(console, "overhead", 2 * (rounds + 1)) as advance:
        values = timing.run(run_dir.timing, prompts, arms, options, rounds=rounds, on_pass=advance)
    console.print(f"{values['overhead']['statement']}: {run_dir.timing}")
