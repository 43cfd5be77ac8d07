"""What an earlier run left in a run directory: it is kept, unless somebody says otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from moescope import prompts as prompts_file
from moescope import replay
from moescope.errors import CommandError
from moescope.overhead import timing
from moescope.run_dir import RunDir


def require_prompts(run_dir: RunDir, prompts: Sequence[str]) -> None:
    """Check that a run directory has no prompts, or these.

    Raises:
        CommandError: It has others.
    """
    if run_dir.prompts.exists() and prompts_file.read(run_dir.prompts) != list(prompts):
        raise CommandError(
            f"{run_dir.prompts} holds other prompts: --force replaces it, or choose another "
            "--run-dir"
        )


def require_no_answers(run_dir: RunDir, or_else: str = "") -> None:
    """Check that a replay would replace no answer.

    Args:
        run_dir: The directory.
        or_else: What the command offers besides ``--force``.

    Raises:
        CommandError: The directory holds answers.
        FormatError: It holds something else under their name.
    """
    if not run_dir.responses.exists():
        return
    answered = sum(one.error is None for one in replay.read_responses(run_dir.responses))
    if answered:
        raise CommandError(
            f"{run_dir.responses} holds the answers to {answered} prompts: {or_else}--force "
            "replaces them, or choose another --run-dir"
        )


def require_no_comparison(run_dir: RunDir) -> None:
    """Check that a comparison would not replace a finished one.

    Raises:
        CommandError: The directory holds one.
        FormatError: It holds something else under its name.
    """
    if timing.is_finished(run_dir.timing):
        raise CommandError(
            f"{run_dir.timing} holds a finished comparison: --force replaces it, or choose another "
            "--run-dir"
        )


def answers(run_dir: RunDir, prompts: Sequence[str]) -> list[replay.Response]:
    """Return the answers that a run directory holds to the first of these prompts.

    Raises:
        CommandError: It holds an answer to another prompt.
        FormatError: It holds something else under their name.
    """
    if not run_dir.responses.exists():
        return []
    kept = [one for one in replay.read_responses(run_dir.responses) if one.error is None]
    for one in kept:
        if one.index >= len(prompts) or prompts[one.index] != one.prompt:
            raise CommandError(
                f"{run_dir.responses} answers other prompts, the first of them prompt "
                f"{one.index + 1}: --resume goes on with the same prompts, or more"
            )
    return kept
