"""Reads inputs and writes the page of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moescope import files, service
from moescope.analyze import token_texts
from moescope.analyze.inputs import Input
from moescope.errors import CommandError
from moescope.view import html
from moescope.view.pack import pack
from moescope.view.read import read
from moescope.view.shown import Selection


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is shown, and how inputs are read."""

    limit: int | None = None
    """Most requests, from the first on; all where None."""
    tokenizer: Path | None = None
    """A ``tokenizer.json``, for the texts of token ids."""
    num_experts: int | None = None
    """Routed experts a layer, for a route log that does not say it."""
    top_k: int | None = None
    """Experts a token and layer, for a route log that does not say it."""


def check(found: Sequence[Input], out: Path) -> None:
    """Check that the page can be written, before the work.

    Raises:
        CommandError: It cannot, would replace an input, or an input has a label.
    """
    files.check_writable(out)
    for one in found:
        if one.path.resolve() == out.resolve():
            raise CommandError(f"{out} is an input, which the page would replace: name another -o")
        if one.label:
            raise CommandError(f"{one.label}={one.path} has a label: view takes paths alone")


def view(found: Sequence[Input], out: Path, options: Options) -> str:
    """Read inputs and write the page.

    Args:
        found: The inputs, of one model.
        out: The file; one that is there is replaced.
        options: What is shown.

    Returns:
        What was written, in words.

    Raises:
        CommandError: The inputs are of several models, have too much, or nothing to show; or the
            service, which has the page, is not installed.
        FormatError: A file is broken.
        OSError: The page cannot be written.
    """
    page = service.page()
    texts = token_texts.read(options.tokenizer) if options.tokenizer else {}
    selection = Selection(options.limit)
    is_device = out.exists() and not out.is_file()  # such as /dev/stdout, which has no directory
    read(
        found,
        selection,
        folder=None if is_device else out.resolve().parent,
        num_experts=options.num_experts,
        top_k=options.top_k,
    )
    written = html.render(page, pack(selection, texts)).encode()
    files.write(out, written)
    num_tokens = sum(one.trace.num_tokens for one in selection.traces)
    left_out = f" ({selection.num_left_out:,} left out)" if selection.num_left_out else ""
    return (
        f"{out}: {selection.num_requests:,} requests{left_out}, {num_tokens:,} tokens, "
        f"{len(written) / 1e6:.1f} MB"
    )
