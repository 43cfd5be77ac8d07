"""The steps of a run; each fills its files in the run directory and shows its progress."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console

from moescope import _service, progress, replay, routes_log
from moescope._client import Client
from moescope.errors import CommandError
from moescope.overhead import hosting, table, timing
from moescope.overhead.arms import Arm, Model
from moescope.overhead.hosting import Hosted, Launcher, Placement
from moescope.replay import Options
from moescope.run_dir import RunDir


@dataclasses.dataclass(frozen=True, slots=True)
class Measurable:
    """Arms that are ready to be measured."""

    arms: Sequence[Arm]
    hosted: Hosted
    commands: dict[str, str]
    """Their command lines or addresses."""


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

    What was answered is written too where the replay is interrupted.

    Raises:
        MoescopeError: The server does not answer at all.
    """
    responses: list[replay.Response] = []

    async def run() -> None:
        with progress.bar(console, "replay", len(prompts)) as advance:

            def note(response: replay.Response) -> None:
                responses.append(response)
                advance()

            async with replay.connect(base_url, api_key) as http:
                await replay.replay(prompts, http, options, note)

    try:
        asyncio.run(run())
    finally:
        if responses:
            responses.sort(key=lambda response: response.index)
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
def hosted(
    run_dir: RunDir,
    arms: Sequence[Arm],
    *,
    model: str | None = None,
    args: Sequence[str] = (),
    placement: Placement = "auto",
    timeout_s: float,
    console: Console,
    env: Mapping[str, str] = os.environ,
) -> Iterator[Measurable]:
    """Start the arms of a comparison, those that run already aside; end them afterwards.

    Args:
        run_dir: Where their logs go.
        arms: The arms.
        model: The model's path or name; the bundled one where None.
        args: Further flags of vLLM, for all built-in arms.
        placement: Side by side or in turn.
        timeout_s: Seconds to wait until a server is ready.
        console: Where to tell what happens.
        env: Their environment.

    Raises:
        CommandError: vLLM is not installed, or the first arm does not start, or no other.
    """
    path, name = model or "", model or ""
    if any(arm.command is None and arm.url is None for arm in arms):
        _service.require("moescope_service", "vllm")
        if not model:
            path, name = _service.bundled_model(), _service.DEMO_MODEL
    launcher = Launcher(
        model=Model(path=path, served_name=name, args=args),
        run_dir=run_dir,
        timeout_s=timeout_s,
        tell=console.print,
        env=env,
    )
    start_s = time.monotonic()
    with hosting.hosted(launcher, arms, placement) as ready:
        console.print(f"ready after {time.monotonic() - start_s:.0f} s: {', '.join(ready.names)}")
        yield Measurable(arms, ready, launcher.commands(arms))


def measure_overhead(
    run_dir: RunDir,
    prompts: Sequence[str],
    measurable: Measurable,
    *,
    options: Options,
    rounds: int,
    api_key: str | None,
    console: Console,
) -> None:
    """Measure what the arms cost; write timing.json after every round, then the picture.

    Raises:
        MoescopeError: See `timing.run`.
    """
    setting = timing.Setting(
        prompts=prompts,
        arms=measurable.arms,
        options=options,
        rounds=rounds,
        api_key=api_key,
    )
    num_arms = len(measurable.hosted.names)
    passes = num_arms * (rounds + 1 if measurable.hosted.host.stays_up else 2 * rounds)
    with progress.bar(console, "overhead", passes) as advance:
        values = timing.run(
            run_dir.timing, setting, measurable.hosted, measurable.commands, advance
        )
    from moescope.overhead import plot  # noqa: PLC0415 - matplotlib is slow to import

    plot.draw(run_dir.overhead, values)
    console.print(table.render(values))
    for statement in timing.statements(values):
        console.print(statement)
    console.print(f"{run_dir.timing}\n{run_dir.overhead}")
