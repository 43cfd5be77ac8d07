"""The arms of a comparison: servers that differ in one thing."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Self

import httpx

from moescope import servers
from moescope._client import Client
from moescope.errors import CommandError, FormatError, ServerError
from moescope.records import ServerInfo

AGAIN = "-again"
"""Ends the name of an arm that is the same as the one without it."""
STOCK, STOCK_AGAIN, MOESCOPE = "stock", f"stock{AGAIN}", "moescope"
COUNTS, PAUSED, INSTALLED = "counts", "paused", "installed"
ROUTED_EXPERTS = "routed-experts"
BUILT_IN = {
    STOCK: "vLLM as it is",
    STOCK_AGAIN: "the same again: the difference between the two is the noise of the run",
    MOESCOPE: "with capture",
    COUNTS: "with capture of counts alone, no routes of tokens",
    PAUSED: "with a capture that POST /routes/pause has paused",
    INSTALLED: "vLLM as it is, but it loads moescope's plugin, which is not enabled",
    ROUTED_EXPERTS: "vLLM's own --enable-return-routed-experts; not on the CPU",
}
"""The arms that moescope can start by itself."""
DEFAULT = (STOCK, STOCK_AGAIN, MOESCOPE)

_MODES = {MOESCOPE: "routes", PAUSED: "routes", COUNTS: "counts"}
"""The ``--routes-mode`` of the arms that have one."""
_MORE_FLAGS: dict[str, tuple[str, ...]] = {
    COUNTS: ("--routes-mode", "counts"),
    ROUTED_EXPERTS: ("--enable-return-routed-experts",),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the built-in arms serve."""

    path: str
    """The model's path or name."""
    served_name: str
    args: Sequence[str] = ()
    """Further flags of vLLM, for all of them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One server: a built-in one, a command that starts one, or one that runs."""

    name: str
    command: str | None = None
    """A command line with ``{port}`` in it."""
    url: str | None = None
    """The address of a server that runs, without ``/v1``."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``NAME``, ``NAME=COMMAND`` or ``NAME=http://…``.

        Raises:
            CommandError: A name without more is not built in, or a command has no ``{port}``.
        """
        name, given, value = text.partition("=")
        if not given:
            if name not in BUILT_IN:
                raise CommandError(
                    f"invalid --arm {name!r}: expected one of {', '.join(BUILT_IN)}, NAME=COMMAND "
                    "with {port} in it, or NAME=http://… of a running server"
                )
            return cls(name=name)
        if value.startswith(("http://", "https://")):
            return cls(name=name, url=value)
        if "{port}" not in value:
            raise CommandError(f"invalid --arm {text!r}: expected {{port}} in the command")
        return cls(name=name, command=value)

    @property
    def is_stock(self) -> bool:
        """Whether nothing of moescope may be enabled in it."""
        return self.name in {STOCK, STOCK_AGAIN, INSTALLED, ROUTED_EXPERTS}

    def command_line(self, model: Model, port: int) -> list[str]:
        """Return the command that starts it."""
        if self.command:
            return shlex.split(self.command.replace("{port}", str(port)))
        flags = [
            *("--served-model-name", model.served_name, "--host", "127.0.0.1", *model.args),
            *(*_MORE_FLAGS.get(self.name, ()), "--port", str(port)),
        ]
        if self.is_stock:
            return servers.stock_command(["--model", model.path, *flags])
        return servers.captured_command([model.path, *flags])

    def environment(self, env: Mapping[str, str]) -> Mapping[str, str]:
        """Return the environment to start it in: a stock arm's has nothing of moescope."""
        if self.name == INSTALLED:
            return servers.installed_env(env)
        return servers.stock_env(env) if self.is_stock else env


def parse_all(texts: Sequence[str]) -> list[Arm]:
    """Parse arms; the first is what the others are compared with.

    Raises:
        CommandError: One is malformed, a name is given twice, or there are fewer than two.
    """
    parsed = [Arm.parse(text) for text in texts]
    names = [arm.name for arm in parsed]
    if len(set(names)) != len(names) or len(names) < 2:
        raise CommandError(
            f"invalid --arm {', '.join(names)}: expected two or more with different names"
        )
    return parsed


def bring_up(arm: Arm, url: str, api_key: str | None = None) -> ServerInfo | None:
    """Bring a server into the state that its arm names, and check it.

    Returns:
        As `check`.

    Raises:
        MoescopeError: It is not.
    """
    prepare(arm, url, api_key)
    return check(arm, url, api_key)


def prepare(
    arm: Arm, url: str, api_key: str | None, transport: httpx.BaseTransport | None = None
) -> None:
    """Bring a server that moescope started into the state that its arm names.

    Raises:
        MoescopeError: The capture cannot be paused.
    """
    if arm.name == PAUSED and not arm.url:
        with Client(url, api_key, transport=transport) as client:
            client.pause()


def check(
    arm: Arm, url: str, api_key: str | None, transport: httpx.BaseTransport | None = None
) -> ServerInfo | None:
    """Check that a server is in the state that its arm names.

    Returns:
        What a server with moescope reports about itself; None for others.

    Raises:
        CommandError: A stock server answers ``/moescope/info``, since a paused capture makes no
            stock arm; or the capture of ``moescope`` is not on, that of ``paused`` not paused.
    """
    with Client(url, api_key, transport=transport) as client:
        try:
            info = client.info()
        except ServerError as error:
            if error.status_code == 404 and arm.name not in _MODES:
                return None
            problem = str(error)
        except FormatError as error:
            problem = str(error)
        else:
            problem = _problem(arm, info)
            if not problem:
                return info
    raise CommandError(f"the arm {arm.name} at {url} is not what its name says: {problem}")


def _problem(arm: Arm, info: ServerInfo) -> str:
    if arm.is_stock:
        return "it answers /moescope/info, so it is not vLLM without moescope"
    if info.mode != (wanted := _MODES.get(arm.name, info.mode)):
        return f"its --routes-mode is {info.mode}, not {wanted}"
    wanted = "paused" if arm.name == PAUSED else "on"
    if arm.name in _MODES and info.capture != wanted:
        return f"its capture is {info.capture}, not {wanted}"
    return ""
