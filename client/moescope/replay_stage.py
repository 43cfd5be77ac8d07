"""Replays prompts into a run directory, and fetches the routes of the answers as they come."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import httpx
from rich.console import Console

from moescope import http, interrupts, progress, replay, routes_stage
from moescope import prompts as prompts_file
from moescope._async_client import AsyncClient
from moescope.addresses import Verify
from moescope.errors import CommandError, ServerError
from moescope.fetching import RoutesFetcher
from moescope.records import ServerInfo
from moescope.replay import Response
from moescope.replayed import Replayed
from moescope.run_dir import RunDir

_SAVE_EVERY_S = 10.0
"""What a replay that is killed may lose of its answers."""
_LAST_FETCHES_S = 30.0
"""How long routes are fetched after Ctrl-C."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is replayed, where, and what is fetched of it."""

    prompts: Sequence[str]
    options: replay.ReplayOptions
    base_url: str
    api_key: str | None = None
    verify: Verify = True
    """How the server's certificate is verified; as for `moescope.Client`."""
    routes: bool = True
    """Whether routes are fetched."""
    layers: str | None = None
    """Layers whose routes are fetched, such as ``0,5-7``; None: those that are there, or all."""
    tokens: bool = False
    """Whether the text of tokens is fetched too."""
    form: str | None = None
    """What the routes are stored as, one of `run_dir.ROUTES_FORMATS`; None: as those that are
    there, or as a route log."""
    kept: Sequence[Response] = ()
    """Answers of before, which are not asked for again; see `earlier_run.answers`."""


def run(run_dir: RunDir, plan: Plan, console: Console) -> Replayed:
    """Replay prompts; write the answers, and the routes in the order of the prompts.

    Nothing in the directory is touched before a prompt is answered: what is there stays where none
    is. Ctrl-C ends the replay with what was answered, whose routes are fetched; another one ends
    that too.

    Args:
        run_dir: The directory; it is made.
        plan: What to replay.
        console: Where to show the progress.

    Raises:
        MoescopeError: The server does not respond, or has no such model or layers.
        OSError: The directory cannot be written to.
    """
    return routes_stage.run_to_end(_Replay(run_dir, plan, console).run())


class _Replay:
    """A replay, and what the run directory holds of it."""

    def __init__(self, run_dir: RunDir, plan: Plan, console: Console) -> None:
        self._run_dir, self._plan, self._console = run_dir, plan, console
        self._new: list[Response] = []
        self._is_begun = False
        self._saved_s = time.monotonic()

    async def run(self) -> Replayed:
        plan = self._plan
        async with contextlib.AsyncExitStack() as stack:
            chat = await stack.enter_async_context(
                http.connect_async(plan.base_url, plan.api_key, verify=plan.verify)
            )
            model = http.served_model(await chat.get("/v1/models"), plan.options.model)
            self._require_model(model)
            fetcher = None
            if plan.routes:
                client = await stack.enter_async_context(
                    AsyncClient(plan.base_url, plan.api_key, verify=plan.verify)
                )
                info = await self._info(client)
                fetcher = routes_stage.open_fetcher(
                    self._run_dir,
                    client,
                    info,
                    plan.layers,
                    keep=bool(plan.kept),
                    tokens=plan.tokens,
                    form=plan.form,
                )
                stack.enter_context(fetcher.draft)
                chat.headers["X-Moescope"] = "on"  # whatever the server's --routes-default
            self._run_dir.create()
            routes = None
            try:
                number = await self._until_signal(chat, model, fetcher)
            finally:
                self._save()
                self._print_answers()
                if fetcher and (self._is_begun or plan.kept):
                    routes = routes_stage.write_log(
                        self._run_dir, fetcher, self._ids, self._console
                    )
            return Replayed(
                run_dir=self._run_dir,
                num_prompts=len(plan.prompts),
                responses=self._responses,
                routes=routes,
                no_routes=fetcher.missing(self._ids) if fetcher else {},
                signal_number=number,
            )

    @property
    def _responses(self) -> list[Response]:
        return sorted([*self._plan.kept, *self._new], key=lambda one: one.index)

    @property
    def _ids(self) -> list[str]:
        return routes_stage.ids_of(self._responses)

    def _require_model(self, model: str) -> None:
        other = {one.model for one in self._plan.kept} - {None, model}
        if other:
            raise CommandError(
                f"the answers in {self._run_dir.responses} are of the model {other.pop()}, not of "
                f"{model}: --resume goes on with the same"
            )

    async def _info(self, client: AsyncClient) -> ServerInfo:
        without = "--no-routes replays without routes"
        try:
            info = await client.info()
        except ServerError as error:
            if error.status_code != 404:
                raise
            raise CommandError(f"{error} {without}") from error
        if info.mode != "routes":
            raise CommandError(f"the server keeps no routes (--routes-mode {info.mode}): {without}")
        if info.capture != "on":
            self._console.print(f"the server's capture is {info.capture}: rows will be missing")
        return info

    async def _until_signal(
        self, chat: httpx.AsyncClient, model: str, fetcher: RoutesFetcher | None
    ) -> int | None:
        totals = {"replay": len(self._plan.prompts) - len(self._plan.kept)}
        if fetcher:
            totals["routes"] = totals["replay"] + len(fetcher.missing(self._ids))
        with progress.bars(self._console, totals) as advances:
            if fetcher:
                fetcher.on_fetched = advances["routes"]
            sending = self._send(chat, model, fetcher, advances["replay"])
            number = await interrupts.until_signal(sending)
            if number and fetcher and fetcher.missing(self._ids):
                self._console.print(
                    f"stopping: routes of the last answers are fetched, for at most "
                    f"{_LAST_FETCHES_S:.0f} s; Ctrl-C ends that too"
                )
                await interrupts.until_signal(_at_most(_LAST_FETCHES_S, fetcher.all(self._ids)))
        return number

    async def _send(
        self,
        chat: httpx.AsyncClient,
        model: str,
        fetcher: RoutesFetcher | None,
        on_response: Callable[[], None],
    ) -> None:
        plan = self._plan
        async with asyncio.TaskGroup() as group:

            async def note(response: Response) -> None:
                self._new.append(response)
                on_response()
                if time.monotonic() > self._saved_s + _SAVE_EVERY_S:
                    self._save()
                if fetcher and response.request_id:
                    await fetcher.start(group, response.request_id)

            if fetcher:
                group.create_task(fetcher.all(routes_stage.ids_of(plan.kept)))
            await replay.replay(
                plan.prompts,
                chat,
                dataclasses.replace(plan.options, model=model),
                note,
                skip={one.index for one in plan.kept},
                offset_s=max((one.end_s for one in plan.kept), default=0.0),
            )

    def _print_answers(self) -> None:
        if not self._is_begun and not self._plan.kept:
            self._console.print(f"no prompt was answered: {self._run_dir.path} stays as it was")
            return
        tokens = sum(one.completion_tokens for one in self._responses)
        kept = f", {len(self._plan.kept)} of them kept" if self._plan.kept else ""
        self._console.print(
            f"{len(self._responses)} responses{kept}, {tokens:,} completion tokens: "
            f"{self._run_dir.responses}"
        )

    def _save(self) -> None:
        """Write the answers; the first of them take the place of what an earlier replay left."""
        self._saved_s = time.monotonic()
        run_dir, plan = self._run_dir, self._plan
        if not self._is_begun:
            is_answered = any(one.error is None for one in self._new)
            if not self._new or (run_dir.responses.exists() and not is_answered):
                return
        replay.write_responses(run_dir.responses, self._responses)
        if not self._is_begun:
            self._is_begun = True
            prompts_file.write(run_dir.prompts, plan.prompts)
            if not plan.kept:
                run_dir.clear_routes()


async def _at_most(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(work, seconds)
