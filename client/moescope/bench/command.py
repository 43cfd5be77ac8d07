"""Runs a load test as the command does: checks first, then the load, then figures and files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from moescope import files
from moescope.bench import latency, result, session, table
from moescope.bench.connections import Target
from moescope.bench.driver import Run
from moescope.bench.plan import Plan
from moescope.errors import CommandError, StoppedError
from moescope.received import shown


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Which figures of a run to show, and which files to write."""

    goodput: tuple[str, ...] = ()
    metrics: str = ",".join(latency.METRICS)
    percentiles: str = "50,90,99"
    result: Path | None = None
    save_detailed: bool = False
    plot: Path | None = None

    def parsed(self) -> tuple[list[str], list[float], dict[str, float]]:
        """Return the metrics, percentiles and limits.

        Raises:
            CommandError: One of them is malformed.
        """
        names = self.metrics.split(",")
        if unknown := [name for name in names if name not in latency.METRICS]:
            raise CommandError(
                f"invalid --percentile-metrics {unknown[0]!r}: expected some of "
                f"{','.join(latency.METRICS)}"
            )
        try:
            percentiles = [float(item) for item in self.percentiles.split(",")]
        except ValueError:
            percentiles = [-1.0]
        if not all(0 <= percentile <= 100 for percentile in percentiles):
            raise CommandError(
                f"invalid --metric-percentiles {self.percentiles!r}: expected numbers from 0 to "
                "100, such as 50,99,99.9"
            )
        return names, percentiles, latency.parse_goodput(self.goodput)

    def check_files(self) -> None:
        """Check that the files can be written.

        Raises:
            CommandError: One cannot, or they are the same.
        """
        for path in filter(None, (self.result, self.plot)):
            files.check_writable(path)
        if self.plot:
            from moescope.bench import plot  # noqa: PLC0415 - matplotlib is slow to import

            plot.check_format(self.plot)
        if self.result and self.plot and self.result.resolve() == self.plot.resolve():
            raise CommandError(f"invalid --plot '{self.plot}': --result is the same file")


def run(plan: Plan, target: Target, report: ReportOptions, console: Console) -> Run:
    """Run a load test, show its figures, write its files.

    Whatever is given is checked before the first request.

    Raises:
        MoescopeError: An option is malformed, a file cannot be written, the server does not
            respond or serves another model, or no request succeeded.
        StoppedError: A signal ended it; the figures and files are those of what was done.
    """
    names, percentiles, limits = report.parsed()
    report.check_files()
    warm_up, conversations = plan.conversations()
    pace, options = plan.pace(), plan.request_options(plan.model or "")
    options = dataclasses.replace(options, model=session.served_model(target, plan.model))
    measured, stopped_by = session.run(
        conversations, options, target, pace, warm_up=warm_up, console=console
    )
    summary = latency.summarize(
        measured.requests,
        measured.duration_s,
        cpu_s=measured.cpu_s,
        percentiles=percentiles,
        goodput_ms=limits,
    )
    about = {"model": shown(options.model), "server": target.base_url, "load": plan.words()}
    console.print(
        table.render(summary, metrics=names, interrupted=measured.interrupted, about=about)
    )
    if report.result:
        values = result.build(
            measured,
            summary,
            plan.requested_load(options, measured.num_requests),
            metrics=names,
            detailed=report.save_detailed,
        )
        result.write(report.result, values)
        console.print(report.result)
    if report.plot:
        from moescope.bench import plot  # noqa: PLC0415 - matplotlib is slow to import

        subtitle = f"{options.model}: {plan.words()}"
        plot.draw(report.plot, measured.requests, measured.duration_s, subtitle)
        console.print(report.plot)
    _require_responses(measured, stopped_by)
    return measured


def _require_responses(measured: Run, stopped_by: int | None) -> None:
    if stopped_by:
        raise StoppedError(
            f"stopped: {len(measured.requests)} of {measured.num_requests} requests had ended, and "
            "the figures are theirs",
            stopped_by,
        )
    if all(one.error for one in measured.requests):
        raise CommandError(f"no request succeeded: {measured.requests[0].error}")
