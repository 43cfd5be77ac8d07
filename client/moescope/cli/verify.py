"""``moescope verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moescope.cli import _options


def verify(
    *,
    url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None,
        typer.Option(help="The checkpoint that is served: a directory, or a hub's name."),
    ] = None,
    against: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="vllm: its own ids, of a server with --enable-return-routed-experts."),
    ] = "transformers",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one a line; 8 problems of our own by default.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many prompts to ask.")] = 8,
    max_tokens: _options.MaxTokensOption = 32,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="What the server computes in; the checkpoint's dtype by default."),
    ] = None,
    reference_dtype: Annotated[
        Literal["float64", "float32"], typer.Option(help="What the reference computes in.")
    ] = "float64",
    device: Annotated[str, typer.Option(help="Where the reference runs.")] = "cpu",
    api_key: _options.ApiKeyOption = None,
) -> None:
    """Compare the routes of a running server with those of its model; 1 where they differ."""
    from moescope import _service, datasets
    from moescope import prompts as prompts_file

    needs = ("torch", "transformers") if against == "transformers" else ()
    service = _service.find("verify.run", needs=needs)
    texts = prompts_file.read(prompts) if prompts else [one.question for one in datasets.sample()]
    is_good = service.main(
        url,
        api_key,
        texts[:limit],
        print,
        against=against,
        model=model,
        dtype=dtype,
        reference_dtype=reference_dtype,
        device=device,
        max_tokens=max_tokens,
    )
    raise typer.Exit(0 if is_good else 1)
