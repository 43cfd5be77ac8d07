"""``moescope verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moescope.cli import _options


def verify(
    *,
    base_url: Annotated[
        str,
        typer.Option("--base-url", "--url", help="The server's address, with or without /v1."),
    ] = _options.DEFAULT_BASE_URL,
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint that is served: a directory, or a name on the Hugging Face hub."
        ),
    ] = None,
    against: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(
            help="Reference: HF transformers, or vLLM's own --enable-return-routed-experts."
        ),
    ] = "transformers",
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts, one per line; the bundled sample by default."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many prompts to send.")] = 8,
    max_tokens: _options.MaxTokensOption = 32,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Dtype that the server computes in; by default what vLLM takes."),
    ] = None,
    reference_dtype: Annotated[
        Literal["float64", "float32"], typer.Option(help="Dtype that the reference computes in.")
    ] = "float64",
    device: Annotated[
        str, typer.Option(help="Device that the reference runs on, such as cuda.")
    ] = "cpu",
    api_key: _options.ApiKeyOption = None,
    ca_cert: _options.CaCertOption = None,
) -> None:
    """Compare a running server's routes with its model's; exit with 1 if they differ."""
    from moescope import datasets, service
    from moescope import prompts as prompts_file

    needs = ("torch", "transformers") if against == "transformers" else ()
    module = service.find("verify.run", needs=needs)
    texts = prompts_file.read(prompts) if prompts else [one.question for one in datasets.sample()]
    is_good = module.main(
        base_url,
        api_key,
        texts[:limit],
        print,
        ca_cert=ca_cert,
        against=against,
        model=model,
        dtype=dtype,
        reference_dtype=reference_dtype,
        device=device,
        max_tokens=max_tokens,
    )
    raise typer.Exit(0 if is_good else 1)
