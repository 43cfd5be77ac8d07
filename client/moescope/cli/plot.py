"""``moescope plot``."""

from __future__ import annotations

from moescope.cli import _options


def plot(*, run_dir: _options.RunDirOption, num_experts: _options.NumExpertsOption = None) -> None:
    """Draw how evenly the experts were used, from RUN_DIR/moe_routes.jsonl."""
    from moescope import plot as plotting
    from moescope import report
    from moescope.run_dir import RunDir

    run = RunDir(run_dir)
    plotting.draw_run(run, num_experts)
    report.write(run, num_experts)
    print(f"{run.histogram}\n{run.layers}")
