"""``moescope serve``: everything after it belongs to the service."""

from __future__ import annotations

from typing import Any

import typer
import typer.core

from moescope import service


class PassThrough(typer.core.TyperCommand):
    """A command that parses nothing, so that every argument arrives as it was given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        """Keep the arguments."""
        ctx.args = args
        return args


def serve(ctx: typer.Context) -> None:
    """Start the server and exit with its status."""
    module = service.find("serve", needs=("vllm",))
    raise typer.Exit(module.main(list(ctx.args)))
