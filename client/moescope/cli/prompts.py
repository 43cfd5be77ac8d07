"""``moescope prompts``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prompts(
    dataset: Annotated[str, typer.Argument(help="gsm8k or sample.")] = "gsm8k",
    *,
    limit: Annotated[int, typer.Option(min=1, help="How many questions, from the first.")] = 25,
    file: Annotated[
        Path | None,
        typer.Option(help="GSM8K's test split as .jsonl; the Hugging Face hub by default."),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write, one prompt a line.")] = Path(
        "prompts.txt"
    ),
) -> None:
    """Write the questions of a data set as prompts."""
    from moescope import datasets
    from moescope import prompts as prompts_file

    questions = datasets.load(dataset, file)[:limit]
    prompts_file.write(out, (item.question for item in questions))
    print(f"{len(questions)} prompts: {out}")
