"""``moescope convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options


def convert(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Run directories, archives, route logs (.jsonl), .npz, .arrow and .parquet, or "
            "globs of them.",
            metavar="INPUT...",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="jsonl, npz, arrow or parquet; by the suffix of --out by default."
        ),
    ] = None,
    long: Annotated[
        bool,
        typer.Option(
            "--long", help="Arrow and Parquet: one row a selection (token, layer and rank)."
        ),
    ] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="With --long: missing rows too, without experts.")
    ] = False,
    since: _options.SinceOption = None,
    until: _options.UntilOption = None,
    model: _options.OfModelOption = None,
    lora: _options.LoraOption = None,
    num_experts: _options.NumExpertsOption = None,
    top_k: _options.TopKOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write routes in another format: of all that analyze reads, to one file."""
    from moescope import convert as converting
    from moescope.analyze import inputs as finding

    options = converting.Options(
        form=form, long=long, missing=missing, num_experts=num_experts, top_k=top_k
    )
    chosen = converting.check(out, options, force=force)
    console = _options.console()
    found = finding.find(inputs, _options.filter_of(since, until, model, lora))
    done = converting.convert(found, out, chosen, options, console)
    for sentence in done.unsaid:
        console.print(sentence)
    print(f"{done.sequences:,} sequences, {done.rows:,} rows, {done.missing_rows:,} missing: {out}")
