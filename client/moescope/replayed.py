"""What a run directory holds after a replay, and what it lacks."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence

from moescope.errors import CommandError, StoppedError
from moescope.replay import Response
from moescope.routes_log import LoggedRoutes
from moescope.run_dir import RunDir


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """The end of a replay, or of fetching what it left."""

    run_dir: RunDir
    num_prompts: int
    responses: Sequence[Response]
    """Answers and failures, in the order of the prompts."""
    routes: LoggedRoutes | None = None
    """What the route log holds; None where none was written."""
    no_routes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why an answer has no routes, by request id."""
    signal_number: int | None = None
    """The signal that ended it early."""

    @property
    def num_answers(self) -> int:
        """How many prompts are answered."""
        return sum(one.error is None for one in self.responses)

    def require_whole(self) -> None:
        """Raise if anything is missing.

        Raises:
            StoppedError: A signal ended it early; the message says how to go on.
            CommandError: Requests failed, or have no routes; the message names the first.
        """
        if self.signal_number is not None:
            raise StoppedError(
                f"stopped by {_name(self.signal_number)}: {self._lacks()}", self.signal_number
            )
        failed = [one for one in self.responses if one.error]
        problems = []
        if failed:
            problems.append(
                f"{len(failed)} of {len(self.responses)} requests failed; "
                f"prompt {failed[0].index + 1}: {failed[0].error}"
            )
        if self.no_routes:
            request_id, reason = next(iter(self.no_routes.items()))
            problems.append(
                f"no routes for {len(self.no_routes)} of {self.num_answers} requests; "
                f"{request_id}: {reason}"
            )
        if problems:
            raise CommandError("; ".join(problems))

    def _lacks(self) -> str:
        lacks = []
        if num_left := self.num_prompts - self.num_answers:
            lacks.append(
                f"{num_left} of {self.num_prompts} prompts have no answer (`moescope replay "
                f"--resume --run-dir {self.run_dir.path}` sends them)"
            )
        if self.no_routes:
            lacks.append(
                f"{len(self.no_routes)} of {self.num_answers} answers have no routes (`moescope "
                f"routes {self.run_dir.path}` fetches them)"
            )
        return ", ".join(lacks) or "all is there"


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
