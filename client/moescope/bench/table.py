"""A load test's figures as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moescope.bench import latency
from moescope.bench.result import percentile_word


def render(
    summary: latency.Summary,
    *,
    metrics: Iterable[str] = latency.METRICS,
    interrupted: int = 0,
    about: Mapping[str, str] | None = None,
) -> Group:
    """Return the tables of a run.

    Args:
        summary: Its figures.
        metrics: The latencies to show, where a request was completed.
        interrupted: Requests that were in flight when it was stopped.
        about: What was run, by what it is: the model, the server, the load.
    """
    parts: list[Table | Text] = [
        _facts(about or {}),
        _totals(summary, interrupted),
        *([_latencies(summary, metrics)] if summary.completed else ()),
    ]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in summary.warnings]
    return Group(*parts)


def _facts(about: Mapping[str, str]) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in about.items():
        table.add_row(name, value)
    return table


def _totals(summary: latency.Summary, interrupted: int) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    errors = ", ".join(f"{kind}: {count}" for kind, count in summary.errors.items())
    facts = [
        ("requests completed", f"{summary.completed:,}"),
        ("requests failed", f"{summary.failed:,}" + (f" ({errors})" if errors else "")),
        ("seconds", f"{summary.duration_s:,.2f}"),
        ("prompt tokens", f"{summary.total_input_tokens:,}"),
        ("output tokens", f"{summary.total_output_tokens:,}"),
        ("requests/s", f"{summary.request_throughput:,.2f}"),
        ("output tokens/s", f"{summary.output_throughput:,.1f}"),
        ("output tokens/s, best second", f"{summary.max_output_tokens_per_s:,.0f}"),
        ("all tokens/s", f"{summary.total_token_throughput:,.1f}"),
        ("requests in flight, peak", f"{summary.max_concurrent_requests:,}"),
        (
            "schedule lag, mean / p99 / max",
            f"{summary.lag.mean_ms:.2f} / {summary.lag.p99_ms:.2f} / {summary.lag.max_ms:.2f} ms",
        ),
    ]
    if summary.client_cpu:
        facts.append(("the client's core busy", f"{summary.client_cpu:.0%}"))
    if summary.request_goodput is not None:
        facts.insert(6, ("good requests/s", f"{summary.request_goodput:,.2f}"))
    if interrupted:
        facts.insert(2, ("requests given up when stopped", f"{interrupted:,}"))
    for fact in facts:
        table.add_row(*fact)
    return table


def _latencies(summary: latency.Summary, metrics: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE)
    names = list(metrics)
    shown = [percentile for percentile in summary.queue.percentiles_ms if percentile != 50]
    heads = ["mean", "median", "std", *(f"p{percentile_word(one)}" for one in shown)]
    table.add_column("ms")
    for head in heads:
        table.add_column(head, justify="right")
    for name in names:
        one = summary.latencies[name]
        values = (one.mean_ms, one.median_ms, one.std_ms, *(one.percentiles_ms[p] for p in shown))
        table.add_row(name.upper(), *(f"{value:,.2f}" for value in values))
    return table
