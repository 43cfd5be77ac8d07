"""The stages of a comparison; each fills its files in the run directory and shows its progress.

The stages of a replay are in `moescope.replay_stage`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rich.console import Console

from moescope import progress, service
from moescope.errors import MoescopeError
from moescope.overhead import table, timing
from moescope.overhead.arms import Arm, Model
from moescope.overhead.hosting import Launcher, StartedArms
from moescope.replay import ReplayOptions
from moescope.run_dir import RunDir


def launcher(
    run_dir: RunDir,
    arms: Sequence[Arm],
    *,
    model: str | None = None,
    args: Sequence[str] = (),
    timeout_s: float,
    console: Console,
    env: Mapping[str, str] = os.environ,
) -> Launcher:
    """Return what starts the arms of a comparison.

    Args:
        run_dir: The directory of their logs.
        arms: The arms.
        model: The model's path or name; the bundled one where None.
        args: Further flags of vLLM, for all built-in arms.
        timeout_s: Seconds to wait until a server is ready.
        console: Where to print what happens.
        env: Their environment.

    Raises:
        CommandError: An arm is built in, and vLLM is not installed.
    """
    path, name = model or "", model or ""
    if any(arm.command is None and arm.url is None for arm in arms):
        service.require("moescope_service", "vllm")
        if not model:
            path, name = service.bundled_model(), service.DEMO_MODEL
    return Launcher(
        model=Model(path=path, served_name=name, args=args),
        run_dir=run_dir,
        timeout_s=timeout_s,
        tell=console.print,
        env=env,
    )


def measure_overhead(
    run_dir: RunDir,
    prompts: Sequence[str],
    started: StartedArms,
    *,
    options: ReplayOptions,
    rounds: int,
    api_key: str | None,
    console: Console,
) -> None:
    """Compare the arms; write timing.json after every round, then the picture.

    Raises:
        MoescopeError: See `timing.run`.
    """
    plan = timing.TimingPlan(prompts=prompts, options=options, rounds=rounds, api_key=api_key)
    per_arm = rounds + 1 if started.arrangement.stays_up else 2 * rounds
    passes = len(started.arms) * per_arm
    with progress.bar(console, "overhead", passes) as advance:
        try:
            values = timing.run(run_dir.timing, plan, started, advance)
        except MoescopeError:
            if not timing.is_finished(run_dir.timing):
                run_dir.overhead.unlink(missing_ok=True)  # it shows an earlier comparison
            raise
    from moescope.overhead import plot  # noqa: PLC0415 - matplotlib is slow to import

    plot.draw(run_dir.overhead, values)
    console.print(table.render(values))
    for statement in timing.statements(values):
        console.print(statement)
    console.print(f"{run_dir.timing}\n{run_dir.overhead}")
