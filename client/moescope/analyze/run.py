"""Reads inputs, computes every figure and writes what ``moescope analyze`` leaves."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.console import Console

from moescope import files, progress
from moescope._style import DPI
from moescope._version import __version__
from moescope.analysis import Profile
from moescope.analyze import inputs, of_groups, of_load, of_pairs, of_tokens, page, token_texts
from moescope.analyze.batches import Batch, Model, gathered
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
_JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


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
    subject = read(found, options, console)
    subject = dataclasses.replace(subject, token_texts=texts)
    out.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    pictures: dict[str, bytes] = {}
    written: list[Path] = []
    with progress.bar(console, "figures", len(_MAKERS)) as advance:
        for make in _MAKERS:
            section = make(subject)
            if section:
                sections.append(section)
                pictures[section.name] = _png(section)
                written += _write(out, section, pictures[section.name])
            advance()
    for name in set(NAMES) - pictures.keys():  # of an earlier analysis
        for suffix in (".png", ".csv"):
            (out / f"{name}{suffix}").unlink(missing_ok=True)
    facts = _facts(subject, found)
    report = page.render("Routes of " + str(subject.model), facts, sections, pictures)
    files.write(out / "report.html", report.encode("utf-8", "replace"))
    numbers = {**_values(subject, found), **{one.name: one.numbers for one in sections}}
    files.write(out / "analysis.json", orjson.dumps(_plain(numbers), option=_JSON))
    return [out / "report.html", out / "analysis.json", *written]


def read(found: Sequence[Input], options: Options, console: Console) -> Subject:
    """Read inputs and count what every figure needs.

    Raises:
        CommandError: The inputs are of several models, or have no row.
        FormatError: A file is broken.
    """
    profile: Profile | None = None
    reader = _Reader(found, options)
    with progress.bar(console, "rows, in percent", 100) as advance:
        shown = 0
        for label in dict.fromkeys(one.label for one in found):
            for batch in gathered(reader.batches(label)):
                model = batch.model
                profile = profile or Profile(
                    len(model.layers), model.num_experts, model.top_k, seed=options.seed
                )
                if batch.rows.num_rows:
                    profile.add(batch.rows, label)
                while shown < int(100 * batch.done):
                    advance()
                    shown += 1
    if profile is None or reader.model is None or not profile.loads:
        raise CommandError(
            f"the inputs have no routed token ({reader.num_missing:,} rows are missing): there is "
            "nothing to analyze"
        )
    return Subject(profile=profile, model=reader.model, num_missing=reader.num_missing)


class _Reader:
    """Reads inputs one after the other, and holds them to one model."""

    def __init__(self, found: Sequence[Input], options: Options) -> None:
        self._found, self._options = found, options
        self._first: Input | None = None
        self._done_bytes = 0
        self._all_bytes = max(1, sum(one.size_bytes for one in found))
        self.model: Model | None = None
        self.num_missing = 0

    def batches(self, label: str) -> Iterator[Batch]:
        """Read the inputs of a label; ``done`` is the part of all inputs."""
        for one in self._found:
            if one.label == label:
                for batch in inputs.read(one, self._options.num_experts, self._options.top_k):
                    self._check(one, batch.model)
                    self.num_missing += batch.num_missing
                    done = self._done_bytes + batch.done * one.size_bytes
                    yield dataclasses.replace(batch, done=done / self._all_bytes)
                self._done_bytes += one.size_bytes

    def _check(self, one: Input, model: Model) -> None:
        if self.model is None or self._first is None:
            self.model, self._first = model, one
            return
        self.model = self.model.joined(model, f"{self._first.path} and {one.path}", "analyze")


def _png(section: Section) -> bytes:
    buffer = io.BytesIO()
    section.picture.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()


def _write(out: Path, section: Section, picture: bytes) -> list[Path]:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(section.header)
    writer.writerows(section.lines)
    paths = [out / f"{section.name}.png", out / f"{section.name}.csv"]
    for path, data in zip(paths, (picture, text.getvalue().encode()), strict=True):
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
    }


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return what orjson takes: contiguous arrays, and text without lone surrogates."""
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return value
