"""Which inputs there are: run directories, archives and files of routes, with labels."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from moescope import route_files
from moescope.analyze import batches, choosing
from moescope.analyze.batches import Batch, Model
from moescope.errors import CommandError
from moescope.filters import EVERY, Filter
from moescope.route_files import Kept, Server, known_of, named
from moescope.run_dir import RunDir

_ARRAYS = (".npz", ".arrow", ".parquet")
_SUFFIXES = (*_ARRAYS, ".jsonl")
_EXPECTED = "a run directory, an archive, a route log (.jsonl), .npz, .arrow or .parquet"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A file of routes."""

    path: Path
    label: str
    """Its domain; empty where none was given."""
    run_dir: RunDir | None = None
    """The run that the file is of, where a directory was named."""
    where: Filter = EVERY
    """Which of its traces are read."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size


def find(arguments: Sequence[str], where: Filter = EVERY) -> list[Input]:
    """Return the files that arguments name: paths and globs, each with ``label=`` or without.

    Args:
        arguments: The arguments.
        where: Which traces of archives; files whose hour rules them out are not opened.

    Raises:
        CommandError: One names nothing that can be read, or nothing that is wanted, or no archive
            where not all traces are wanted; or only some have a label.
        FormatError: A file is broken.
    """
    found: dict[tuple[Path, str], Input] = {}
    for argument in arguments:
        label, pattern = _split(argument)
        names = [pattern]
        if glob.has_magic(pattern):
            names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute ones too
        if not names:
            raise CommandError(f"no file matches {pattern}")
        named_files = [one for name in names for one in _inputs(Path(name), label)]
        if where:
            chosen = choosing.chosen(argument, [one.path for one in named_files], where)
            named_files = [Input(path=path, label=label, where=where) for path in chosen]
        for one in named_files:
            found[one.path.resolve(), label] = one
    labels = {one.label for one in found.values()}
    if len(labels) > 1 and "" in labels:
        without = next(one.path for one in found.values() if not one.label)
        raise CommandError(f"{without} has no label, and others have: give each one, label=path")
    return list(found.values())


def _split(argument: str) -> tuple[str, str]:
    label, equals, pattern = argument.partition("=")
    is_path = Path(argument).exists() or glob.glob(argument)  # noqa: PTH207 - absolute ones too
    if not equals or is_path or "/" in label:  # an archive's directories are called date=…
        return "", argument
    if not label or not pattern:
        raise CommandError(f"invalid input {argument!r}: expected a path, or label=path")
    return label, pattern


def _inputs(path: Path, label: str) -> list[Input]:
    if not path.exists():
        raise CommandError(f"there is no {path}: expected {_EXPECTED}")
    if not path.is_dir():
        if path.suffix not in _SUFFIXES:
            raise CommandError(f"cannot tell what {path} is by its name: expected {_EXPECTED}")
        return [Input(path=path, label=label)]
    run_dir = RunDir(path)
    if run_dir.routes.exists():
        return [Input(path=run_dir.routes, label=label, run_dir=run_dir)]
    files = [one for one in sorted(path.iterdir()) if one.suffix in _ARRAYS]
    files = files or sorted(path.rglob("part-*.parquet"))  # of an archive
    if not files:
        raise CommandError(
            f"{path} holds no {run_dir.routes.name}, .npz, .arrow or .parquet: `moescope replay` "
            "writes one"
        )
    return [Input(path=one, label=label) for one in files]


def read(
    one: Input,
    num_experts: int | None = None,
    top_k: int | None = None,
    *,
    folder: Path | None = None,
) -> Iterator[Batch]:
    """Read an input some rows at a time.

    Args:
        one: The input.
        num_experts: Routed experts a layer, for a route log that does not say it.
        top_k: Experts a token and layer, for a route log that does not say it.
        folder: As of `route_files.read`.

    Raises:
        CommandError: It holds several models, or needs what is not installed.
        FormatError: It is broken; the message names it.
    """
    found = traces(one, num_experts, top_k, folder=folder)
    with named(one.path):
        yield from batches.of((kept for _, kept in found), one.label)


def traces(
    one: Input,
    num_experts: int | None = None,
    top_k: int | None = None,
    *,
    folder: Path | None = None,
) -> Iterator[tuple[Server, Kept]]:
    """Read an input as traces, one after the other, each with what is known of its server.

    Args:
        one: The input.
        num_experts: As of `read`.
        top_k: As of `read`.
        folder: As of `route_files.read`.

    Raises:
        CommandError: It needs what is not installed.
        FormatError: It is broken; the message names it.
    """
    with named(one.path):
        known = known_of(one.run_dir) if one.run_dir else {}
        server, found = route_files.read(
            one.path,
            known,
            num_experts=num_experts,
            top_k=top_k,
            folder=folder,
            where=one.where,
        )
        for kept in found:
            yield server, kept


class Reader:
    """Reads inputs one after the other, and holds them to one model.

    Attributes:
        model: That of the inputs; None before the first batch.
        num_missing: Rows that were not captured, of what was read.

    Args:
        found: The inputs.
        num_experts: As of `read`.
        top_k: As of `read`.
        folder: As of `read`.
    """

    def __init__(
        self,
        found: Sequence[Input],
        num_experts: int | None = None,
        top_k: int | None = None,
        *,
        folder: Path | None = None,
    ) -> None:
        self._found, self._num_experts, self._top_k = found, num_experts, top_k
        self._folder = folder
        self._first: Input | None = None
        self._done_bytes = 0
        self._all_bytes = max(1, sum(one.size_bytes for one in found))
        self.model: Model | None = None
        self.num_missing = 0

    def batches(self, label: str) -> Iterator[Batch]:
        """Read the inputs of a label; ``done`` is the part of all inputs.

        Raises:
            CommandError: As `read` does; or they are of several models.
            FormatError: As `read` does.
        """
        for one in self._found:
            if one.label == label:
                for batch in read(one, self._num_experts, self._top_k, folder=self._folder):
                    self._check(one, batch.model)
                    self.num_missing += batch.num_missing
                    done = self._done_bytes + batch.done * one.size_bytes
                    yield dataclasses.replace(batch, done=done / self._all_bytes)
                self._done_bytes += one.size_bytes

    def _check(self, one: Input, model: Model) -> None:
        if self.model is None or self._first is None:
            self.model, self._first = model, one
            return
        self.model = self.model.joined(model, f"{self._first.path} and {one.path}")
