"""Writes routes in another format, one trace after the other, however many there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moescope import files, progress, route_files
from moescope.analyze import inputs
from moescope.analyze.inputs import Input
from moescope.errors import CommandError
from moescope.route_files import Spool, log

_TABLES = ("arrow", "parquet")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is written, and how inputs are read."""

    form: str | None = None
    """One of `route_files.FORMATS`; the suffix of the output where None."""
    long: bool = False
    """Whether a table has one row a selection, not one a token."""
    missing: bool = False
    """Whether that form has missing rows."""
    num_experts: int | None = None
    """Routed experts a layer, for a route log that does not say it."""
    top_k: int | None = None
    """Experts a token and layer, for a route log that does not say it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written."""

    sequences: int
    rows: int
    """Of traces, missing ones included."""
    missing_rows: int
    unsaid: Sequence[str]
    """What the inputs do not say, and what the format cannot, in sentences."""


def check(out: Path, options: Options, *, force: bool) -> str:
    """Check that the output can be written, before the work; return its format.

    Raises:
        CommandError: It cannot, or it is there already.
    """
    form = options.form or out.suffix.removeprefix(".")
    if options.form is None and form not in route_files.FORMATS:
        raise CommandError(
            f"cannot tell the format of {out} by its name: end it in "
            f"{', '.join(f'.{one}' for one in route_files.FORMATS)}, or add --format"
        )
    route_files.check(form)
    if options.long and form not in _TABLES:
        raise CommandError(f"--long is a form of tables: --format arrow or parquet, not {form}")
    if options.missing and not options.long:
        raise CommandError("--missing is for --long: the other formats have every row")
    files.check_writable(out)
    if out.exists() and not out.is_file():
        raise CommandError(f"cannot write {out}: it is no regular file")
    if out.exists() and not force:
        raise CommandError(f"{out} exists: --force replaces it, or choose another --out")
    return form


def convert(
    found: Sequence[Input], out: Path, form: str, options: Options, console: Console
) -> Converted:
    """Read inputs of one model and write all their traces, in their order.

    Args:
        found: The inputs.
        out: The file; it is there as a whole, or as it was.
        form: Its format.
        options: What is written, and how inputs are read.
        console: Where to show the progress.

    Raises:
        CommandError: An input has a label, or none has a trace.
        FormatError: A file is broken, or of another model than those before.
        OSError: The output cannot be written.
    """
    labeled = next((one for one in found if one.label), None)
    if labeled:
        raise CommandError(f"{labeled.label}={labeled.path} has a label, which no format holds")
    folder = out.resolve().parent
    with Spool(folder) as spool:
        knows_prompts = _read(found, spool, folder, options, console)
        stored = spool.stored()
        if not stored.entries:
            raise CommandError("the inputs have no trace: there is nothing to convert")
        with files.replacing(out) as named:
            new = named.with_name(f"{named.name}.{form}")  # which says the format
            try:
                route_files.write(new, stored, long=options.long, missing=options.missing)
                new.replace(named)
            finally:
                new.unlink(missing_ok=True)
        return Converted(
            sequences=len(stored.entries),
            rows=stored.num_rows,
            missing_rows=stored.num_missing,
            unsaid=_unsaid(found, form, options, knows_prompts=knows_prompts),
        )


def _read(
    found: Sequence[Input], spool: Spool, folder: Path, options: Options, console: Console
) -> bool:
    """Put the traces of inputs into a spool; return whether all prompts are known."""
    all_bytes = max(1, sum(one.size_bytes for one in found))
    done_bytes, knows_prompts = 0, True
    with progress.parts(console, ["traces, in percent"]) as (tell,):
        for one in found:
            for server, kept in inputs.traces(
                one, options.num_experts, options.top_k, folder=folder
            ):
                spool.server = spool.server or server
                spool.add(kept)
                knows_prompts = knows_prompts and kept.knows_prompt
                tell((done_bytes + kept.done * one.size_bytes) / all_bytes)
            done_bytes += one.size_bytes
        tell(1.0)
    return knows_prompts


def _unsaid(
    found: Sequence[Input], form: str, options: Options, *, knows_prompts: bool
) -> list[str]:
    said = []
    logs = [one for one in found if one.path.suffix == ".jsonl"]
    if logs and form != "jsonl":
        said.append(
            f"{logs[0].path} is a route log: every row that it has is taken for computed, since it "
            "does not tell which are cached"
        )
    if not knows_prompts and form != "jsonl":
        said.append(
            "a route log without its run directory does not say where prompts end, nor the token "
            "ids: both are null, the text of tokens is left out, and traces cannot be made of the "
            "file"
        )
    if form == "jsonl":
        said.append(f"a route log has no {log.UNSAID}: converted back, they are not there")
    if options.long:
        left = "last tokens" if options.missing else "last tokens and missing rows"
        said.append(f"the long form has no {left}, and traces cannot be made of it")
    return said
