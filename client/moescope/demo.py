"""The whole way, with the bundled model: serve, replay, fetch, draw, measure, report."""

from __future__ import annotations

import os
import time

from rich.console import Console

from moescope import _service, datasets, plot, prompts, replay, report, steps
from moescope.errors import CommandError
from moescope.overhead.arms import DEFAULT, MOESCOPE, parse_all
from moescope.run_dir import RunDir

_FLAGS = ("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048")


def run(
    run_dir: RunDir, *, limit: int, rounds: int, start_timeout_s: float, console: Console
) -> None:
    """Run the demo and fill a run directory.

    Args:
        run_dir: The directory; files of an earlier run in it are replaced.
        limit: How many questions of the bundled sample to replay.
        rounds: Rounds of the overhead measurement.
        start_timeout_s: Seconds to wait until both servers are ready.
        console: Where to tell what happens.

    Raises:
        MoescopeError: A step failed; the message says which and why.
    """
    started_s = time.monotonic()
    run_dir.create()
    run_dir.clear()
    questions = [item.question for item in datasets.sample()[:limit]]
    prompts.write(run_dir.prompts, questions)
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}  # GiB; the servers share the machine
    console.rule("servers")
    with steps.hosted(
        run_dir,
        parse_all(DEFAULT),
        args=_FLAGS,
        placement="together",
        timeout_s=start_timeout_s,
        console=console,
        env=env,
    ) as ready:
        if MOESCOPE not in ready.hosted.names:
            raise CommandError(ready.hosted.refused[MOESCOPE])
        _run_steps(run_dir, questions, ready, rounds, env.get("VLLM_API_KEY"), console)
    console.rule("done")
    console.print(f"{time.monotonic() - started_s:.0f} s in all. Where to look:")
    for path, what in (
        (run_dir.report, "the run in one page"),
        (run_dir.histogram, "selections per expert"),
        (run_dir.layers, "load of every expert in every layer"),
        (run_dir.routes, "the experts of every token, layer by layer"),
        (run_dir.responses, "questions and answers"),
        (run_dir.timing, "what the capture cost"),
        (run_dir.overhead, "the same as a picture, with the noise of the run"),
    ):
        console.print(f"  {path}  {what}")


def _run_steps(
    run_dir: RunDir,
    questions: list[str],
    ready: steps.Measurable,
    rounds: int,
    key: str | None,
    console: Console,
) -> None:
    options = replay.Options(model=_service.DEMO_MODEL)
    console.rule("replay and routes")
    with ready.hosted.host.visit(MOESCOPE) as url:
        responses = steps.replay_prompts(
            run_dir, questions, base_url=url, api_key=key, options=options, console=console
        )
        replay.require_all(responses)
        steps.fetch_routes(
            run_dir, responses, base_url=url, api_key=key, layers=None, console=console
        )
    plot.draw_run(run_dir)
    console.rule("what the capture costs")
    steps.measure_overhead(
        run_dir,
        questions,
        ready,
        options=options,
        rounds=rounds,
        api_key=key,
        console=console,
    )
    report.write(run_dir)
