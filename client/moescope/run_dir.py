"""A run directory: what each file in it is called, and what it holds."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from moescope.errors import CommandError

ROUTES_FORMATS = ("jsonl", "npz", "arrow", "parquet")
"""What the routes of a run are stored as, the suffix of their file; the first one by default."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunDir:
    """The files of one run.

    Args:
        path: The directory.
    """

    path: Path

    @property
    def prompts(self) -> Path:
        """The prompts, one a line; see `moescope.prompts`."""
        return self.path / "prompts.txt"

    @property
    def responses(self) -> Path:
        """One `moescope.replay.Response` a line, in the order of the prompts."""
        return self.path / "responses.jsonl"

    @property
    def routes(self) -> Path:
        """The routes of all responses, in the format that they have; see `moescope.route_files`."""
        every = [self.routes_as(form) for form in ROUTES_FORMATS]
        return next((path for path in every if path.exists()), every[0])

    def routes_as(self, form: str) -> Path:
        """Return where the routes are in one of `ROUTES_FORMATS`."""
        return self.path / f"moe_routes.{form}"

    @property
    def histogram(self) -> Path:
        """Selections per expert in the worst layer, and the balance of all."""
        return self.path / "expert_hist.png"

    @property
    def layers(self) -> Path:
        """Load of every expert in every layer."""
        return self.path / "expert_layers.png"

    @property
    def timing(self) -> Path:
        """What the capture cost; see `moescope.overhead`."""
        return self.path / "timing.json"

    @property
    def overhead(self) -> Path:
        """The picture of that."""
        return self.path / "overhead.png"

    @property
    def report(self) -> Path:
        """The run in one page."""
        return self.path / "report.md"

    def server_log(self, arm: str) -> Path:
        """Return the path of the log of a server that moescope started."""
        return self.path / f"server_{arm}.log"

    def check(self) -> None:
        """Check that files can be written to the directory; makes nothing.

        Raises:
            CommandError: It is no directory and cannot be made, or cannot be written to.
        """
        there = next(one for one in (self.path, *self.path.absolute().parents) if one.exists())
        if not there.is_dir():
            raise CommandError(f"cannot write to {self.path}: {there} is not a directory")
        if not os.access(there, os.W_OK | os.X_OK):
            raise CommandError(f"cannot write to {self.path}: no permission to write to {there}")

    def create(self) -> None:
        """Make the directory, where there is none.

        Raises:
            CommandError: It cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"cannot make {self.path}: {error.strerror}") from error

    def clear_routes(self) -> None:
        """Remove the routes of an earlier replay, and what was drawn of them."""
        for form in ROUTES_FORMATS:
            self.routes_as(form).unlink(missing_ok=True)
        self.clear_pictures()

    def clear_pictures(self) -> None:
        """Remove what was drawn of routes: `moescope.plot` draws it anew."""
        self.histogram.unlink(missing_ok=True)
        self.layers.unlink(missing_ok=True)

    def clear_comparison(self) -> None:
        """Remove what an earlier comparison left, and the report of it."""
        for file in (self.timing, self.overhead, self.report):
            file.unlink(missing_ok=True)
