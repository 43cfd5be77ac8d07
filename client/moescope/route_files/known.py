"""What a run directory knows of the requests whose routes it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moescope import replay
from moescope.run_dir import RunDir


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a request besides its routes."""

    prompt_len: int
    num_tokens: int
    """Prompt and output tokens."""
    token_ids: Sequence[int] | None
    """Prompt and output; None where they are not known."""
    finish_reason: str | None


def known_of(run_dir: RunDir) -> dict[str, Known]:
    """Return what a run directory's answers say of its requests, by their id.

    Raises:
        FormatError: The file of the answers is malformed.
    """
    if not run_dir.responses.exists():
        return {}
    known = {}
    for one in replay.read_responses(run_dir.responses):
        if one.request_id is not None and one.error is None:
            has_tokens = one.prompt_token_ids is not None and one.token_ids is not None
            tokens = [*(one.prompt_token_ids or ()), *(one.token_ids or ())]
            known[one.request_id] = Known(
                prompt_len=one.prompt_tokens,
                num_tokens=one.prompt_tokens + one.completion_tokens,
                token_ids=tokens if has_tokens else None,
                finish_reason=one.finish_reason,
            )
    return known
