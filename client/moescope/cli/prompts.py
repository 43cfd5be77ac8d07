"""``moescope prompts``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prompts(
    dataset: Annotated[str, typer.Argument(help="Data set: gsm8k, prose or sample.")] = "gsm8k",
    *,
    limit: Annotated[int, typer.Option(min=1, help="Number of questions, from the first on.")] = 25,
    file: Annotated[
        Path | None,
        typer.Option(help="GSM8K's test split as .jsonl; the Hugging Face hub by default."),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write, with one prompt per line.")] = Path(
        "prompts.txt"
    ),
) -> None:
    """Write the questions of a data set as prompts."""
    from moescope import datasets, files
    from moescope import prompts as prompts_file

    files.check_writable(out)
    questions = datasets.load(dataset, file)
    prompts_file.write(out, (item.question for item in questions[:limit]))
    all_of_them = f", all that {file or dataset} has" if limit > len(questions) else ""
    print(f"{min(limit, len(questions))} prompts{all_of_them}: {out}")
