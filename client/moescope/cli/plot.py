"""``moescope plot``."""

from __future__ import annotations

from moescope.cli import _options


def plot(
    *,
    run_dir: _options.RunDirOption,
    num_experts: _options.NumExpertsOption = None,
    top_k: _options.TopKOption = None,
) -> None:
    """Draw how evenly the experts were used, from the routes in RUN_DIR."""
    from moescope import plot as plotting
    from moescope import report, route_files
    from moescope.run_dir import RunDir

    run = RunDir(run_dir)
    run.check()
    routes = route_files.counted(run.routes, num_experts, top_k)
    if routes.inferred:
        print(f"inferred from the records of {run.routes}: {'; '.join(routes.inferred)}")
    plotting.draw_run(run, routes)
    report.write(run, routes)
    print(f"{run.histogram}\n{run.layers}")
