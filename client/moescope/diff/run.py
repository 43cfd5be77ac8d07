"""Reads two servers' routes, or three, compares them and writes what ``moescope diff`` leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moescope import files, progress
from moescope.analyze import written
from moescope.diff import comparing, draw, findings, said, side, tables
from moescope.diff.result import Result, Source
from moescope.errors import CommandError
from moescope.run_dir import RunDir


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How servers are compared."""

    near_tie: float
    """As `moescope.analysis.Differences` takes it."""
    seed: int = 0
    """That of the intervals."""
    num_experts: int | None = None
    """Routed experts a layer, for a route log that does not say it."""
    top_k: int | None = None
    """Experts a token and layer, for a route log that does not say it."""


def check(sources: Sequence[Source], out: Path, *, force: bool) -> None:
    """Check that sources can be compared, and the comparison written, before the work.

    Raises:
        CommandError: They are no runs of their own, or the directory cannot be written to or holds
            another comparison.
    """
    labeled = [one for source in sources for one in source.inputs if one.label]
    if labeled:
        raise CommandError(f"{labeled[0].path} has the label {labeled[0].label}: diff takes none")
    for source, other in itertools.combinations(sources, 2):
        others = {one.path.resolve(): one.where for one in other.inputs}
        pairs = ((one.where, others.get(one.path.resolve())) for one in source.inputs)
        if any(where is not None and not one.excludes(where) for one, where in pairs):
            raise CommandError(
                f"{source.name} and {other.name} are the same files: expected two runs, or parts "
                "of an archive that have no trace in common"
            )
    if (out / "diff.json").exists() and not force:
        raise CommandError(
            f"{out} holds an earlier comparison: --force replaces it, or choose another --out"
        )
    RunDir(out).check()


def diff(sources: Sequence[Source], out: Path, options: Options, console: Console) -> Result:
    """Compare servers.

    Args:
        sources: The first server, the second one and, where it is there, the first again.
        out: The directory that `write` will write to; nothing is left in it.
        options: How they are compared.
        console: Where to show the progress.

    Raises:
        CommandError: They cannot be compared.
        FormatError: A file is broken.
        OSError: There is no room for the rows.
    """
    folder = files.folder_of(out)
    names = ("A", "B", "A again")[: len(sources)]
    labels = [*names, *(f"A | {name}" for name in names[1:])]
    labels = [f"{label}: rows, in percent" for label in labels]
    with contextlib.ExitStack() as stack, progress.parts(console, labels) as tells:
        sides = [
            side.read(
                source.name,
                source.inputs,
                [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(2)],
                num_experts=options.num_experts,
                top_k=options.top_k,
                folder=folder,
                tell=tell,
            )
            for source, tell in zip(sources, tells, strict=False)
        ]
        comparisons = [
            comparing.compare(
                sides[0], other, near_tie=options.near_tie, seed=options.seed, tell=tell
            )
            for other, tell in zip(sides[1:], tells[len(sides) :], strict=True)
        ]
    comparison, again = comparisons[0], comparisons[1] if len(comparisons) > 1 else None
    return Result(
        sources=sources,
        sides=sides,
        comparison=comparison,
        again=again,
        found=findings.find(comparison, again),
        near_tie=options.near_tie,
        seed=options.seed,
    )


def write(result: Result, out: Path, console: Console) -> list[Path]:
    """Say what was found, and write the picture, the tables and ``diff.json``.

    Args:
        result: What was found.
        out: The directory; it is made where it is missing.
        console: Where to say it.

    Returns:
        The files.

    Raises:
        OSError: A file cannot be written.
    """
    console.print("\n".join(said.lines(result)))
    console.print(said.table(result))
    contents = {
        "diff.json": written.json(tables.values(result)),
        "diff.png": written.png(draw.picture(result)),
        "diff.csv": written.table(*tables.by_layer(result)),
        "sequences.csv": written.table(*tables.by_sequence(result)),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        files.write(out / name, data)
    return [out / name for name in contents]
