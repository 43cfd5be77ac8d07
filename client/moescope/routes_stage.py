"""Fetches the routes of a run's answers into its file of routes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from moescope import interrupts, progress, replay, route_files, routes_log
from moescope._async_client import AsyncClient
from moescope.addresses import Verify
from moescope.errors import CommandError, LayerNotCapturedError
from moescope.fetching import Draft, RoutesFetcher
from moescope.layers import parse_layers
from moescope.log_draft import LogDraft
from moescope.records import ServerInfo
from moescope.replay import Response
from moescope.replayed import Replayed
from moescope.run_dir import ROUTES_FORMATS, RunDir
from moescope.traces_draft import TracesDraft


def fetch_missing(
    run_dir: RunDir,
    *,
    base_url: str,
    api_key: str | None,
    layers: str | None,
    console: Console,
    verify: Verify = True,
    tokens: bool = False,
) -> Replayed:
    """Fetch the routes of the answers that have none; those that are there stay.

    Args:
        run_dir: The directory.
        base_url: The address of the server that answered.
        api_key: Its API key, if it needs one.
        layers: As in `moescope.replay_stage.Plan`.
        console: Where to show the progress.
        verify: As in `moescope.replay_stage.Plan`.
        tokens: As in `moescope.replay_stage.Plan`.

    Raises:
        MoescopeError: There are no answers, or the server does not respond, or has no such layers.
        OSError: The directory cannot be written to.
    """
    responses = [one for one in replay.read_responses(run_dir.responses) if one.error is None]
    ids = ids_of(responses)

    async def fetch() -> Replayed:
        async with AsyncClient(base_url, api_key, verify=verify) as client:
            info = await client.info()
            fetcher = open_fetcher(run_dir, client, info, layers, keep=True, tokens=tokens)
            with fetcher.draft:
                with progress.bar(console, "routes", len(fetcher.missing(ids))) as advance:
                    fetcher.on_fetched = advance
                    number = await interrupts.until_signal(fetcher.all(ids))
                return Replayed(
                    run_dir=run_dir,
                    num_prompts=len(responses),
                    responses=responses,
                    routes=write_log(run_dir, fetcher, ids, console),
                    no_routes=fetcher.missing(ids),
                    signal_number=number,
                )

    return run_to_end(fetch())


def ids_of(responses: Iterable[Response]) -> list[str]:
    """Return the ids of the requests that were answered."""
    return [one.request_id for one in responses if one.request_id]


def open_fetcher(
    run_dir: RunDir,
    client: AsyncClient,
    info: ServerInfo,
    layers: str | None,
    *,
    keep: bool,
    tokens: bool,
    form: str | None = None,
) -> RoutesFetcher:
    """Return what fetches routes into the draft of a run's file, with what that holds if kept.

    Args:
        run_dir: The directory.
        client: Of the server.
        info: The server's.
        layers: As in `moescope.replay_stage.Plan`.
        keep: Whether what the file holds is kept.
        tokens: As in `moescope.replay_stage.Plan`.
        form: As in `moescope.replay_stage.Plan`.

    Raises:
        CommandError: The layers are malformed, or do not fit to what the file holds; or that has
            another format; or the server has no tokens.
        FormatError: What it holds are no routes, or those of other experts.
        LayerNotCapturedError: The server does not capture them.
    """
    if tokens and not info.token_ids:
        raise CommandError(
            "the server keeps token ids out (--routes-token-ids off): leave --tokens out"
        )
    path = _path(run_dir, form, keep=keep)
    logged = None
    if keep and path.exists():
        logged = route_files.counted(path, info.num_experts, info.top_k)
        logged = logged if logged.rows else None
    try:
        wanted = parse_layers(layers) if layers is not None else None
    except ValueError as error:
        raise CommandError(f"invalid --layers {layers!r}: {error}") from error
    chosen = wanted or (logged.layers if logged else info.layers)
    unknown = [layer for layer in chosen if layer not in info.layers]
    if unknown:
        raise LayerNotCapturedError(unknown, info.layers)
    run_dir.create()
    draft: Draft
    if path.suffix == ".jsonl":
        draft = LogDraft(path, info, chosen, logged)
    else:
        draft = TracesDraft(path, info, chosen, keep=logged is not None)
    asked = None if tuple(chosen) == info.layers else draft.layers
    return RoutesFetcher(functools.partial(client.routes, layers=asked, tokens=tokens), draft)


def _path(run_dir: RunDir, form: str | None, *, keep: bool) -> Path:
    """Return the file of the routes.

    Raises:
        CommandError: The format is none, or not that of the routes that are kept.
    """
    there = run_dir.routes
    kept = there.suffix.removeprefix(".") if keep and there.exists() else None
    if form is not None and kept not in {None, form}:
        raise CommandError(
            f"{there} holds routes, and --format is {form}: they are continued in their own format "
            f"(leave --format out); `moescope convert {run_dir.path}` makes a file of another"
        )
    chosen = form or kept or ROUTES_FORMATS[0]
    route_files.check(chosen)
    return run_dir.routes_as(chosen)


def write_log(
    run_dir: RunDir, fetcher: RoutesFetcher, request_ids: Sequence[str], console: Console
) -> routes_log.LoggedRoutes:
    """Write the routes of a run, unless nothing is new; print and return what they are."""
    path = fetcher.draft.path
    if fetcher.num_fetched or not path.exists():
        fetcher.draft.write(request_ids)
        run_dir.clear_pictures()
    logged = route_files.counted(path)
    console.print(
        f"routes of {logged.sequences} sequences, {logged.rows:,} rows, "
        f"{logged.missing_rows:,} of them missing: {path}"
    )
    return logged


def run_to_end(work: Coroutine[Any, Any, Replayed]) -> Replayed:
    """Run work; raise the first error of a group of tasks as it is."""
    try:
        return asyncio.run(work)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
