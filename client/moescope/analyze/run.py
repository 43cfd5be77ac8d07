"""Reads inputs, computes every figure and writes what ``moescope analyze`` leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from moescope import files, progress
from moescope._version import __version__
from moescope.analysis import Profile, Rows
from moescope.analyze import (
    inputs,
    of_groups,
    of_load,
    of_pairs,
    of_tokens,
    page,
    token_texts,
    written,
)
from moescope.analyze.batches import gathered
from moescope.analyze.inputs import Input
from moescope.analyze.section import NAMES, Section, Subject
from moescope.errors import CommandError
from moescope.run_dir import RunDir

_MAKERS: Sequence[Callable[[Subject], Section | None]] = (
    *(of_load.load, of_load.balance, of_load.coverage),
    *(of_groups.phases, of_groups.positions, of_groups.domains),
    *(of_pairs.co_activation, of_pairs.transitions, of_pairs.next_layer),
    *(of_tokens.vocabulary, of_tokens.similarity, of_tokens.effective_experts),
)
_MAX_TEXTS = 2**20
"""Token ids whose text is kept: more than any vocabulary has."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How inputs are read."""

    tokenizer: Path | None = None
    """A ``tokenizer.json``, for the texts of token ids."""
    num_experts: int | None = None
    """Routed experts a layer, for a route log that does not say it."""
    top_k: int | None = None
    """Experts a token and layer, for a route log that does not say it."""
    seed: int = 0
    """That of the intervals."""


def check(out: Path, *, force: bool) -> None:
    """Check that an analysis can be written, before the work.

    Raises:
        CommandError: It cannot, or the directory holds another one.
    """
    if (out / "analysis.json").exists() and not force:
        raise CommandError(
            f"{out} holds an earlier analysis: --force replaces it, or choose another --out"
        )
    RunDir(out).check()


def analyze(found: Sequence[Input], out: Path, options: Options, console: Console) -> list[Path]:
    """Read inputs and write figures, tables, ``report.html`` and ``analysis.json``.

    Args:
        found: The inputs, of one model.
        out: The directory; it is made where it is missing.
        options: How inputs are read.
        console: Where to show the progress.

    Returns:
        The files, the report first.

    Raises:
        CommandError: The inputs are of several models, or have no row.
        FormatError: A file is broken.
        OSError: A file cannot be written.
    """
    texts = token_texts.read(options.tokenizer) if options.tokenizer else {}
    subject = read(found, options, console, folder=files.folder_of(out))
    subject = dataclasses.replace(subject, token_texts={**subject.token_texts, **texts})
    out.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    pictures: dict[str, bytes] = {}
    paths: list[Path] = []
    with progress.bar(console, "figures", len(_MAKERS)) as advance:
        for make in _MAKERS:
            section = make(subject)
            if section:
                sections.append(section)
                pictures[section.name] = written.png(section.picture)
                paths += _write(out, section, pictures[section.name])
            advance()
    for name in set(NAMES) - pictures.keys():  # of an earlier analysis
        for suffix in (".png", ".csv"):
            (out / f"{name}{suffix}").unlink(missing_ok=True)
    facts = _facts(subject, found)
    report = page.render("Routes of " + str(subject.model), facts, sections, pictures)
    files.write(out / "report.html", report.encode("utf-8", "replace"))
    numbers = {**_values(subject, found), **{one.name: one.numbers for one in sections}}
    files.write(out / "analysis.json", written.json(numbers))
    return [out / "report.html", out / "analysis.json", *paths]


def read(
    found: Sequence[Input], options: Options, console: Console, *, folder: Path | None = None
) -> Subject:
    """Read inputs and count what every figure needs.

    Args:
        found: The inputs.
        options: How they are read.
        console: Where to show the progress.
        folder: As of `inputs.read`.

    Raises:
        CommandError: The inputs are of several models, or have no row.
        FormatError: A file is broken.
    """
    profile: Profile | None = None
    texts: dict[int, str] = {}
    reader = inputs.Reader(found, options.num_experts, options.top_k, folder=folder)
    with progress.parts(console, ["rows, in percent"]) as (tell,):
        for label in dict.fromkeys(one.label for one in found):
            for batches in gathered(reader.batches(label)):
                model = batches[0].model
                profile = profile or Profile(
                    len(model.layers), model.num_experts, model.top_k, seed=options.seed
                )
                rows = Rows.joined([one.rows for one in batches])
                if rows.num_rows:
                    profile.add(rows, label)
                for batch in batches:
                    for token, text in batch.token_texts.items():
                        if len(texts) < _MAX_TEXTS:
                            texts.setdefault(token, text)
                tell(batches[-1].done)
    if profile is None or reader.model is None or not profile.loads:
        raise CommandError(
            f"the inputs have no routed token ({reader.num_missing:,} rows are missing): there is "
            "nothing to analyze"
        )
    return Subject(
        profile=profile, model=reader.model, num_missing=reader.num_missing, token_texts=texts
    )


def _write(out: Path, section: Section, picture: bytes) -> list[Path]:
    paths = [out / f"{section.name}.png", out / f"{section.name}.csv"]
    table = written.table(section.header, section.lines)
    for path, data in zip(paths, (picture, table), strict=True):
        files.write(path, data)
    return paths


def _facts(subject: Subject, found: Sequence[Input]) -> dict[str, str]:
    labels = [label for label in subject.profile.labels if label]
    facts = {
        "model": subject.model.name or "unknown",
        "experts": f"top-{subject.model.top_k} of {subject.model.num_experts}, in "
        f"{len(subject.layers)} layers",
        "requests": f"{subject.profile.num_requests:,}",
        "routed tokens": f"{subject.num_rows:,}, and {subject.num_missing:,} missing",
        "inputs": f"{len(found)}: {', '.join(one.path.name for one in found[:5])}"
        + (" …" if len(found) > 5 else ""),
    }
    if found[0].where:
        facts["traces"] = f"only those {found[0].where}"
    return facts | ({"domains": ", ".join(labels)} if labels else {})


def _values(subject: Subject, found: Sequence[Input]) -> dict[str, Any]:
    return {
        "moescope": __version__,
        "model": subject.model.name,
        "layers": subject.layers,
        "num_experts": subject.model.num_experts,
        "top_k": subject.model.top_k,
        "requests": subject.profile.num_requests,
        "rows": subject.num_rows,
        "missing_rows": subject.num_missing,
        "seed": subject.profile.seed,
        "inputs": [{"path": str(one.path), "label": one.label} for one in found],
        "filter": found[0].where.given,
    }
