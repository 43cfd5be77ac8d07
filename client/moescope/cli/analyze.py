"""``moescope analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options


def analyze(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Run directories, archives, route logs (.jsonl), .npz, .arrow and .parquet, or "
            "globs of them; label=path gives a domain.",
            metavar="INPUT...",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for the figures, tables and report.")
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="tokenizer.json, or the checkpoint's directory, for the texts of token ids."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the intervals.")] = 0,
    since: _options.SinceOption = None,
    until: _options.UntilOption = None,
    model: _options.OfModelOption = None,
    lora: _options.LoraOption = None,
    num_experts: _options.NumExpertsOption = None,
    top_k: _options.TopKOption = None,
    force: _options.ForceOption = False,
) -> None:
    """Compute figures of routes, with a table and a picture each, and a report of all."""
    from moescope.analyze import inputs as finding
    from moescope.analyze import run

    found = finding.find(inputs, _options.filter_of(since, until, model, lora))
    run.check(out, force=force)
    options = run.Options(tokenizer=tokenizer, seed=seed, num_experts=num_experts, top_k=top_k)
    for path in run.analyze(found, out, options, _options.console())[:2]:
        print(path)
