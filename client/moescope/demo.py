"""All stages of a run with the bundled model: serve, replay, fetch, draw, measure, report."""

from __future__ import annotations

import os
import time

from rich.console import Console

from moescope import datasets, earlier_run, plot, replay, replay_stage, report, service, stages
from moescope.errors import CommandError
from moescope.overhead import hosting
from moescope.overhead.arms import DEFAULT, MOESCOPE, parse_all
from moescope.run_dir import RunDir

_FLAGS = ("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048")

_CAVEAT = (
    "The bundled model is a toy whose steps take milliseconds; the capture's work is a smaller "
    "share of a larger model's: docs/performance.md"
)


def run(
    run_dir: RunDir,
    *,
    limit: int,
    rounds: int,
    start_timeout_s: float,
    force: bool = False,
    console: Console,
) -> None:
    """Run the demo and fill a run directory.

    Args:
        run_dir: The directory.
        limit: How many questions of the bundled sample to replay.
        rounds: Rounds of the overhead measurement.
        start_timeout_s: Seconds to wait until both servers are ready.
        force: Whether to replace what an earlier run left.
        console: Where to print what happens.

    Raises:
        MoescopeError: A stage failed; the message says which and why.
    """
    started_s = time.monotonic()
    questions = [item.question for item in datasets.sample()[:limit]]
    run_dir.check()
    if not force:
        earlier_run.require_no_answers(run_dir)
        earlier_run.require_no_comparison(run_dir)
        earlier_run.require_prompts(run_dir, questions)
    run_dir.create()
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}  # GiB; the servers share the machine
    console.rule("servers")
    arms = parse_all(DEFAULT)
    launcher = stages.launcher(
        run_dir, arms, args=_FLAGS, timeout_s=start_timeout_s, console=console, env=env
    )
    with hosting.start_arms(launcher, arms, "together") as started:
        if MOESCOPE not in started.names:
            raise CommandError(started.refused[MOESCOPE])
        _run_stages(run_dir, questions, started, rounds, env.get("VLLM_API_KEY"), console)
    console.rule("done")
    console.print(f"{time.monotonic() - started_s:.0f} s in all. The files:")
    for path, what in (
        (run_dir.report, "the run in one page"),
        (run_dir.histogram, "selections per expert"),
        (run_dir.layers, "load of every expert in every layer"),
        (run_dir.routes, "the experts of every token, layer by layer"),
        (run_dir.responses, "prompts and outputs"),
        (run_dir.timing, "what the capture cost"),
        (run_dir.overhead, "the same as a picture, with the noise of the run"),
    ):
        console.print(f"  {path}  {what}")


def _run_stages(
    run_dir: RunDir,
    questions: list[str],
    started: hosting.StartedArms,
    rounds: int,
    key: str | None,
    console: Console,
) -> None:
    options = replay.ReplayOptions(model=service.DEMO_MODEL)
    console.rule("replay and routes")
    with started.arrangement.visit(MOESCOPE) as url:
        plan = replay_stage.Plan(prompts=questions, options=options, base_url=url, api_key=key)
        done = replay_stage.run(run_dir, plan, console)
    if done.num_answers:
        run_dir.clear_comparison()
    done.require_whole()
    plot.draw_run(run_dir, done.routes)
    console.rule("what the capture costs")
    stages.measure_overhead(
        run_dir,
        questions[: options.concurrency],  # one wave: short rounds, and many, even out the noise
        started,
        options=options,
        rounds=rounds,
        api_key=key,
        console=console,
    )
    console.print(_CAVEAT)
    report.write(run_dir, done.routes)
