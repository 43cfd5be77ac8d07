"""timing.json: what the capture cost, with everything needed to measure it again."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import orjson

from moescope import environment, overhead, replay
from moescope._client import Client
from moescope.errors import CommandError, FormatError, ServerError
from moescope.records import ServerInfo


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """Where the two servers are."""

    captured_url: str
    stock_url: str
    api_key: str | None = None
    commands: Mapping[str, str] | None = None
    """Their command lines by arm, where moescope started them."""


def run(
    path: Path,
    prompts: Sequence[str],
    arms: Arms,
    options: replay.Options,
    *,
    rounds: int,
    on_pass: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Measure, and write timing.json.

    Args:
        path: The file.
        prompts: The user messages.
        arms: The two servers.
        options: How to ask.
        rounds: Rounds that count.
        on_pass: Called after each of the ``2 * (rounds + 1)`` passes.

    Returns:
        What was written.

    Raises:
        CommandError: An arm is not what it must be, or a request failed.
    """
    with Client(arms.captured_url, arms.api_key) as client:
        info = client.info()
    if info.capture != "on":
        raise CommandError(f"the capture of {arms.captured_url} is {info.capture}: resume it")
    require_stock(arms.stock_url)
    options = dataclasses.replace(options, model=options.model or info.model)
    measured = asyncio.run(_measure(prompts, arms, options, rounds, on_pass))
    values = {
        **overhead.summarize(measured, options.seed),
        **_setting(prompts, info, options, arms.commands),
    }
    path.write_bytes(orjson.dumps(values, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return values


def require_stock(url: str, transport: httpx.BaseTransport | None = None) -> None:
    """Check that a server has nothing of moescope enabled: a paused server is no stock arm.

    Raises:
        CommandError: It answers ``/moescope/info``.
    """
    with Client(url, transport=transport) as client:
        try:
            client.info()
        except ServerError as error:
            if error.status_code == 404:
                return
            problem = str(error)
        except FormatError as error:
            problem = str(error)
        else:
            problem = "it answers /moescope/info"
    raise CommandError(f"{url} is not vLLM without moescope: {problem}")


def read(path: Path) -> dict[str, Any]:
    """Read a timing.json.

    Raises:
        FormatError: The file cannot be read, or holds something else.
    """
    try:
        values = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise FormatError(f"{path} is no timing.json: {error}") from error
    if not isinstance(values, dict) or "overhead" not in values:
        raise FormatError(f"{path} is no timing.json: it has no overhead")
    return values


async def _measure(
    prompts: Sequence[str],
    arms: Arms,
    options: replay.Options,
    rounds: int,
    on_pass: Callable[[], None] | None,
) -> list[overhead.Round]:
    async with (
        replay.connect(arms.stock_url, arms.api_key) as stock,
        replay.connect(arms.captured_url, arms.api_key) as captured,
    ):
        clients: dict[overhead.ArmName, httpx.AsyncClient] = {"no_log": stock, "log": captured}
        return await overhead.measure(prompts, clients, options, rounds=rounds, on_pass=on_pass)


def _setting(
    prompts: Sequence[str],
    info: ServerInfo,
    options: replay.Options,
    commands: Mapping[str, str] | None,
) -> dict[str, Any]:
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "model": info.model,
        "device": info.device,
        "hardware": environment.hardware(),
        "versions": {**info.versions, **environment.system()},
        "prompts": len(prompts),
        "options": options,
        "commands": commands,
    }
