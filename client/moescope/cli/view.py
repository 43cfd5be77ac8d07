"""``moescope view``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options


def view(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Run directories, archives, route logs (.jsonl), .npz, .arrow and .parquet, or "
            "globs.",
            metavar="INPUT...",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most requests, from the first on; all by default.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="tokenizer.json, or the checkpoint's directory, for the texts of token ids."
        ),
    ] = None,
    since: _options.SinceOption = None,
    until: _options.UntilOption = None,
    model: _options.OfModelOption = None,
    lora: _options.LoraOption = None,
    num_experts: _options.NumExpertsOption = None,
    top_k: _options.TopKOption = None,
) -> None:
    """Write routes and the page that shows them as one HTML file, which needs no server."""
    from moescope.analyze import inputs as finding
    from moescope.view import run

    found = finding.find(inputs, _options.filter_of(since, until, model, lora))
    run.check(found, out)
    options = run.Options(limit=limit, tokenizer=tokenizer, num_experts=num_experts, top_k=top_k)
    print(run.view(found, out, options))
