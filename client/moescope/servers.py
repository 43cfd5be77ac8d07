"""Starts servers as processes of their own, and ends them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from moescope import http
from moescope.errors import CommandError, ConnectionFailedError

_POLL_S = 0.5
_HEALTH_TIMEOUT_S = 5.0
_STOP_S = 20.0
_TAIL_LINES = 15
_PYTHON = (sys.executable, "-P")
"""Imports what is installed, whatever lies in the working directory."""
_PLUGIN = "moescope"
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


class Server:
    """A server process in a process group of its own; a context manager that ends it.

    Args:
        name: Its name in messages.
        command: The command line.
        url: Where it will listen.
        log: The file that its output goes to.
        env: Its environment.
    """

    def __init__(
        self, name: str, command: Sequence[str], url: str, log: Path, env: Mapping[str, str]
    ) -> None:
        self.name, self.command, self.url, self.log = name, tuple(command), url, log
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self._env),
                # No session of its own: Linux shares processors between sessions (autogroup), and
                # a busy engine was seen to keep its client off them for 10 s.
                process_group=0,
            )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process's id; 0 before it was started."""
        return self._process.pid if self._process else 0

    def suspend(self) -> None:
        """Take the processor from all processes of its group, until `resume` or `stop`."""
        self._signal_group(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the processes of its group go on."""
        self._signal_group(signal.SIGCONT)

    def stop(self) -> None:
        """End the process: SIGTERM first, then SIGKILL to what is left of its group."""
        if self._process is None:
            return
        self.resume()  # a suspended process does not see SIGTERM
        self._process.terminate()
        try:
            self.wait_exit(_STOP_S)
        finally:  # a second Ctrl-C while it waits leaves nothing behind either
            self._signal_group(signal.SIGKILL)
            self._process.wait()

    def is_ready(self) -> bool:
        """Return whether ``/health`` responds with 200.

        Raises:
            CommandError: The process has ended; the message holds the end of its log.
        """
        status = self._process.poll() if self._process else None
        if status is not None:
            raise CommandError(
                f"the {self.name} server ended with status {status} before it was ready; "
                f"the end of {self.log}:\n{self._tail()}"
            )
        with (
            contextlib.suppress(ConnectionFailedError),
            http.connect(self.url, timeout_s=_HEALTH_TIMEOUT_S) as client,
        ):
            return client.get("/health").status_code == 200
        return False

    def wait_exit(self, timeout_s: float) -> None:
        """Wait until the process ends, at most so many seconds."""
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)

    def _signal_group(self, number: signal.Signals) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:]) or "  (empty)"


def wait_ready(servers: Sequence[Server], timeout_s: float) -> None:
    """Wait until every server is ready.

    Raises:
        CommandError: A server ended, or was not ready in time.
    """
    deadline_s = time.monotonic() + timeout_s
    waiting = list(servers)
    while waiting := [server for server in waiting if not server.is_ready()]:
        if time.monotonic() > deadline_s:
            raise CommandError(
                f"the {waiting[0].name} server was not ready after {timeout_s:.0f} s; "
                f"see {waiting[0].log}"
            )
        waiting[0].wait_exit(_POLL_S)


def captured_command(args: Sequence[str]) -> list[str]:
    """Return the command of a server with capture."""
    return [*_PYTHON, "-m", "moescope", "serve", *args]


def stock_command(args: Sequence[str]) -> list[str]:
    """Return the command of vLLM's own server.

    Source: vLLM 0.32.0, ``vllm/entrypoints/launchers/api_server/entry.py``. ``vllm serve`` does
    not start with vLLM's CPU wheel.
    """
    return [*_PYTHON, "-m", "vllm.entrypoints.launchers.api_server.entry", *args]


def stock_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which vLLM does not load moescope's plugin.

    Where ``VLLM_PLUGINS`` is unset vLLM would load it, though it does nothing unless it is enabled:
    then all others are named.
    """
    stock = _without_settings(env)
    names = [name for name in _plugin_names(env) if name != _PLUGIN]
    return {**stock, "VLLM_PLUGINS": ",".join(names)}


def installed_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which vLLM loads moescope's plugin, and nothing enables it."""
    installed = _without_settings(env)
    if "VLLM_PLUGINS" in env and _PLUGIN not in (names := _plugin_names(env)):
        installed["VLLM_PLUGINS"] = ",".join([*names, _PLUGIN])
    return installed


def _without_settings(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in env.items()
        if not name.startswith(("MOESCOPE_", "VLLM_LOG_MOE"))
    }


def _plugin_names(env: Mapping[str, str]) -> list[str]:
    if "VLLM_PLUGINS" in env:
        return [name for name in env["VLLM_PLUGINS"].split(",") if name]
    return found_plugins(env)


def found_plugins(env: Mapping[str, str]) -> list[str]:
    """Return the plugins that vLLM loads by itself where ``VLLM_PLUGINS`` is unset.

    Source: vLLM 0.32.0, ``vllm/plugins/__init__.py``; endpoint plugins want to be named.

    Args:
        env: The environment of a Python like this one: its ``PYTHONPATH`` counts.
    """
    path = [*filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    found = [
        point.name
        for distribution in importlib.metadata.distributions(path=path)
        for point in distribution.entry_points
        if point.group in _PLUGIN_GROUPS
    ]
    return list(dict.fromkeys(found))


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]


def end_servers_on_signals() -> None:
    """Make SIGTERM and SIGHUP unwind the stack, so that servers this process started end too."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
