"""``moescope diff``."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options


def diff(
    a: Annotated[
        str,
        typer.Argument(
            help="Routes of the first server: a run directory, an archive, a route log "
            "(.jsonl), .npz, .arrow or .parquet, or a glob of them.",
            show_default=False,
        ),
    ],
    b: Annotated[
        str, typer.Argument(help="Routes of the second server, likewise.", show_default=False)
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for what is written.")],
    again: Annotated[
        str | None,
        typer.Option(help="Another run of the first server: what differs there is noise."),
    ] = None,
    near_tie: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Other experts are a near-tie where none is heavier than the lowest weight "
            "selected by more than this part of it.",
        ),
    ] = 0.05,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 1 where a number is above a bound, such as rows=0.01; repeatable. One "
            "of rows, near-ties, order, weights, loads, texts, changed.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the intervals.")] = 0,
    since: Annotated[list[dt.datetime] | None, _options.SINCE] = None,
    until: Annotated[list[dt.datetime] | None, _options.UNTIL] = None,
    model: Annotated[list[str] | None, _options.MODEL] = None,
    lora: Annotated[list[str] | None, _options.LORA] = None,
    num_experts: _options.NumExpertsOption = None,
    top_k: _options.TopKOption = None,
    force: _options.ForceOption = False,
) -> None:
    """Compare the routes of the same prompts on two servers, and name the layers that changed.

    What chooses from archives is given once for all sides, or once for each: A, B and --again.
    """
    from moescope.analyze import inputs
    from moescope.diff import bounds, findings, run
    from moescope.diff.result import Source
    from moescope.errors import CommandError

    try:
        wanted = bounds.parse(fail_above or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--fail-above") from error
    console = _options.console()
    names = [a, b, *([] if again is None else [again])]
    wheres = _options.filters_of(len(names), since, until, model, lora)
    sources = [
        Source(name=f"{name}, {where}" if where else name, inputs=inputs.find([name], where))
        for name, where in zip(names, wheres, strict=True)
    ]
    run.check(sources, out, force=force)
    options = run.Options(near_tie=near_tie, seed=seed, num_experts=num_experts, top_k=top_k)
    result = run.diff(sources, out, options, console)
    for path in run.write(result, out, console)[:2]:
        print(path)
    if words := bounds.exceeded(wanted, findings.totals(result.comparison, result.found)):
        raise CommandError("; ".join(words))
