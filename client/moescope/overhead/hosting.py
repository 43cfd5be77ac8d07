"""Starts the arms: side by side, or one after the other where memory is short."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from moescope import servers
from moescope.errors import CommandError
from moescope.overhead.arms import ROUTED_EXPERTS, Arm, Model
from moescope.run_dir import RunDir

Placement = Literal["auto", "together", "in-turn"]
_MARGIN = 1.2
"""An arm may need this much more memory than the first took."""
_WANTS_V2 = "Model Runner V2"
"""Words of vLLM 0.32.0's refusal, ``vllm/config/vllm.py``."""


def available_memory() -> dict[str, int]:
    """Return the free memory of this machine and of its NVIDIA GPUs, in bytes."""
    free = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free["host"] = int(line.split()[1]) * 1024
    if shutil.which("nvidia-smi"):
        query = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
        for number, line in enumerate(done.stdout.splitlines()):
            if line.strip().isdigit():
                free[f"gpu {number}"] = int(line) * 2**20
    return free


class Arrangement(Protocol):
    """How arms are reached."""

    @property
    def stays_up(self) -> bool:
        """Whether a server is the same from one visit to the next."""

    def visit(self, name: str) -> contextlib.AbstractContextManager[str]:
        """Give an arm's address for the time of a visit."""


@dataclasses.dataclass(frozen=True, slots=True)
class SideBySide:
    """Arms that are all up at the same time.

    The next visit needs the cores of the arm before: vLLM's processes go on spinning for a second
    after the last request. What a suspended server has left to do it does in its own next visit.

    Source: vLLM 0.32.0, ``distributed/device_communicators/shm_broadcast.py`` (``SpinCondition``).
    """

    urls: Mapping[str, str]
    """By arm."""
    suspended: Mapping[str, servers.Server] = dataclasses.field(default_factory=dict)
    """By arm: servers that run during their visits alone."""
    stays_up: ClassVar[bool] = True

    @contextlib.contextmanager
    def visit(self, name: str) -> Iterator[str]:
        """Give an arm's address; its server runs for the time of the visit."""
        server = self.suspended.get(name)
        if server is None:
            yield self.urls[name]
            return
        server.resume()
        try:
            yield self.urls[name]
        finally:
            server.suspend()


@dataclasses.dataclass(frozen=True, slots=True)
class InTurn:
    """Arms of which one is up at a time: every visit starts a server and ends it."""

    launcher: Launcher
    arms: Mapping[str, Arm]
    """By name."""
    stays_up: ClassVar[bool] = False

    @contextlib.contextmanager
    def visit(self, name: str) -> Iterator[str]:
        """Start an arm, unless its address was given; give its address.

        Raises:
            CommandError: It does not start.
        """
        arm = self.arms[name]
        if arm.url:
            yield arm.url
            return
        with self.launcher.server(arm) as server:
            servers.wait_ready((server,), self.launcher.timeout_s)
            yield server.url


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """How servers are started."""

    model: Model
    run_dir: RunDir
    timeout_s: float
    """Seconds to wait until a server is ready."""
    tell: Callable[[str], object]
    """Called with each message about the start."""
    suspends_idle: bool = True
    """Whether servers that stay up are suspended between their visits."""
    free_memory: Callable[[], dict[str, int]] = available_memory
    env: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))

    def server(self, arm: Arm) -> servers.Server:
        """Return the server of an arm, on a free port, not yet started."""
        (port,) = servers.free_ports(1)
        return servers.Server(
            arm.name,
            arm.command_line(self.model, port),
            f"http://127.0.0.1:{port}",
            self.run_dir.server_log(arm.name),
            arm.environment(self.env),
        )

    def commands(self, arms: Sequence[Arm]) -> dict[str, str]:
        """Return by arm its address, or its command line as one types it in this directory."""
        here = Path.cwd()
        path = Path(self.model.path)
        model = (
            dataclasses.replace(self.model, path=str(path.relative_to(here)))
            if path.is_relative_to(here)
            else self.model
        )
        return {
            arm.name: arm.url
            or arm.command
            or shlex.join(["python", *arm.command_line(model, 0)[1:-1]]) + " {port}"
            for arm in arms
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StartedArms:
    """Arms that can be measured."""

    arms: Sequence[Arm]
    """In the order given, without those refused."""
    arrangement: Arrangement
    """How they are reached."""
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By name of an arm that did not start: the reason."""
    commands: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By name: the command line or address, those refused among them."""

    @property
    def names(self) -> list[str]:
        """The names of the arms."""
        return [arm.name for arm in self.arms]


@contextlib.contextmanager
def start_arms(
    launcher: Launcher, arms: Sequence[Arm], placement: Placement
) -> Iterator[StartedArms]:
    """Start the arms, or prepare to start them in turn; end them afterwards.

    ``auto`` starts the first, and the others beside it if there is as much memory as it took for
    each of them.

    Raises:
        CommandError: The first arm does not start, or no other does.
    """
    start_s, commands = time.monotonic(), launcher.commands(arms)
    with contextlib.ExitStack() as stack:
        started: dict[str, servers.Server] = {}
        together = placement != "in-turn"
        if placement == "auto":
            together = _first_fits(launcher, arms, stack, started)
        if not together:
            stack.close()
            in_turn = InTurn(launcher, {arm.name: arm for arm in arms})
            yield StartedArms(arms=arms, arrangement=in_turn, commands=commands)
            return
        urls, refused = _start(launcher, arms, stack, started)
        if len(urls) < 2:
            raise CommandError("; ".join(refused.values()))
        launcher.tell(f"ready after {time.monotonic() - start_s:.0f} s: {', '.join(urls)}")
        to_suspend = {
            name: server
            for name, server in started.items()
            if name in urls and launcher.suspends_idle
        }
        for server in to_suspend.values():
            server.suspend()  # leaving the stack ends it, suspended or not
        yield StartedArms(
            arms=[arm for arm in arms if arm.name in urls],
            arrangement=SideBySide(urls, to_suspend),
            refused=refused,
            commands=commands,
        )


def _first_fits(
    launcher: Launcher,
    arms: Sequence[Arm],
    stack: contextlib.ExitStack,
    started: dict[str, servers.Server],
) -> bool:
    """Start the first arm that needs starting; return whether the others fit beside it."""
    to_start = [arm for arm in arms if not arm.url]
    if len(to_start) < 2:
        return True
    first, *more = to_start
    launcher.tell(f"starting {first.name}, to see how much memory it takes")
    before = launcher.free_memory()
    started[first.name] = stack.enter_context(launcher.server(first))
    servers.wait_ready((started[first.name],), launcher.timeout_s)
    if fits(before, launcher.free_memory(), len(more)):
        return True
    launcher.tell("memory is short: the arms run in turn, each started anew in every round")
    return False


def _start(
    launcher: Launcher,
    arms: Sequence[Arm],
    stack: contextlib.ExitStack,
    started: dict[str, servers.Server],
) -> tuple[dict[str, str], dict[str, str]]:
    """Start arms at once; return addresses and reasons of those refused, never the first."""
    to_start = [arm for arm in arms if not arm.url and arm.name not in started]
    if to_start:
        names = ", ".join(arm.name for arm in to_start)
        launcher.tell(f"starting {names}; this takes a minute or two")
    started |= {arm.name: stack.enter_context(launcher.server(arm)) for arm in to_start}
    urls, refused = {}, {}
    for arm in arms:
        if arm.url:
            urls[arm.name] = arm.url
            continue
        server = started[arm.name]
        try:
            servers.wait_ready((server,), launcher.timeout_s)
        except CommandError as error:
            if arm is arms[0]:
                raise
            server.stop()
            refused[arm.name] = refusal(arm.name, error, server.log)
            launcher.tell(f"left out: {refused[arm.name]}")
        else:
            urls[arm.name] = server.url
    return urls, refused


def refusal(name: str, error: CommandError, log: Path) -> str:
    """Return why an arm did not start."""
    if name == ROUTED_EXPERTS and _WANTS_V2 in log.read_text(errors="replace"):
        return (
            f"{name}: vLLM refuses --enable-return-routed-experts, since it needs the V2 model "
            "runner: the CPU has none, on a GPU set VLLM_USE_V2_MODEL_RUNNER=1"
        )
    return f"{name}: {error}"


def fits(before: Mapping[str, int], after: Mapping[str, int], more: int) -> bool:
    """Return whether there is as much memory as the first server took for each of the others.

    Args:
        before: Free memory before it was started, in bytes.
        after: Free memory now.
        more: How many others.
    """
    return all(
        after[name] >= _MARGIN * more * max(0, before[name] - after[name])
        for name in before.keys() & after.keys()
    )
