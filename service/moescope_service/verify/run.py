"""Verifies a running server on a few prompts, and says in lines of text what matched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from moescope.errors import CommandError
from moescope.trace import Source
from moescope_service.verify.requests import Answer, Asker

Say = Callable[[str], None]
MIN_CONTROL = 0.25
"""Share of wrong rows that must be noticed as mismatches, for the comparison to prove anything."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is verified, and against what."""

    against: Literal["transformers", "vllm"] = "transformers"
    """HF transformers with the same checkpoint, or vLLM's own ``routed_experts``."""
    model: str | None = None
    """The checkpoint; needed for HF transformers."""
    dtype: str | None = None
    """What the server computes in; the checkpoint's dtype where None."""
    reference_dtype: str = "float64"
    device: str = "cpu"
    """Where the reference runs."""
    max_tokens: int = 32


def main(url: str, api_key: str | None, prompts: Sequence[str], say: Say, **options: Any) -> bool:
    """Verify the server at an address; see `verify`, and `Options` for the rest."""
    asker = Asker(url, api_key)
    try:
        return verify(asker, prompts, Options(**options), say)
    finally:
        asker.close()


def verify(asker: Asker, prompts: Sequence[str], options: Options, say: Say) -> bool:
    """Verify a server.

    Args:
        asker: The server.
        prompts: What to ask it.
        options: Against what.
        say: Takes a line of text.

    Returns:
        Whether all of it matched: no row is missing, mismatched, or wrong in a weight.

    Raises:
        CommandError: It cannot be verified like this; the message says why.
    """
    if options.against == "transformers" and options.model is None:
        raise CommandError("--model is needed: the checkpoint that is served")
    reference = _reference(asker, options, say) if options.against == "transformers" else None
    before = asker.missing()
    answers = asker.ask(prompts, options.max_tokens)
    cached = sum(int((answer.trace.source == Source.CACHED).sum()) for answer in answers)
    tokens = sum(answer.trace.num_rows for answer in answers)
    say(f"{len(answers)} sequences, {tokens:,} routed tokens, {cached:,} of them in the cache")
    if reference is None:
        is_good = _against_vllm(asker, answers, say)
    else:
        is_good = _against_transformers(reference, answers, say)
    _say_missing(before, asker.missing(), answers, say)
    say("everything matches" if is_good else "NOT everything matches")
    return is_good


def _reference(asker: Asker, options: Options, say: Say) -> Any:
    from moescope_service.verify.reference import Reference

    layers = asker.client.info().layers
    assert options.model is not None  # noqa: S101
    reference = Reference(
        options.model, layers, options.reference_dtype, options.dtype, options.device
    )
    say(f"reference: HF transformers in {options.reference_dtype}, {reference.scheme.name}")
    return reference


def _against_transformers(reference: Any, answers: Sequence[Answer], say: Say) -> bool:
    from moescope_service.verify.comparison import Counts, compare

    total, control = Counts(), Counts()
    for answer in answers:
        want = reference.routes(answer.token_ids[:-1])
        total.add(compare(answer.trace, want))
        control.add(compare(answer.trace, want, shift=1))
    say(f"rows (token, layer): {total.rows:,}")
    say(f"  equal sets of experts: {total.equal:,} ({_share(total.equal, total.rows)})")
    say(
        f"  near-ties in {reference.server_dtype}: {total.near_ties:,} "
        f"({_share(total.near_ties, total.rows)}); the largest gap of all different rows is "
        f"{total.largest_gap:.2f} of the tolerance"
    )
    say(f"  mismatches: {total.mismatches:,}")
    say(f"  missing: {total.missing:,}")
    say(
        f"  largest weight error: {total.largest_weight_error:.1e}; rows beyond the tolerance: "
        f"{total.wrong_weights:,}"
    )
    wrong = control.mismatches / max(control.rows - control.missing, 1)
    say(f"control, each row against its neighbor's: {wrong:.1%} mismatches")
    if wrong < MIN_CONTROL:
        say("  so many equal neighbors prove nothing: give other prompts")
    return total.is_good and wrong >= MIN_CONTROL


def _against_vllm(asker: Asker, answers: Sequence[Answer], say: Say) -> bool:
    if any(answer.vllm_npy is None for answer in answers):
        raise CommandError(
            "the server returns no expert ids of vLLM's own: start it with "
            "--enable-return-routed-experts"
        )
    whole = [answer for answer in answers if answer.trace.complete]
    equal = [answer for answer in whole if asker.npy(answer.request_id) == answer.vllm_npy]
    rows, same = (
        sum(answer.trace.num_rows * answer.trace.num_layers for answer in chosen)
        for chosen in (answers, equal)
    )
    missing = sum(int((~one.trace.present).sum()) * one.trace.num_layers for one in answers)
    say(f"rows (token, layer): {rows:,}, byte for byte vLLM's own: {same:,}, missing: {missing:,}")
    return len(equal) == len(answers)


def _say_missing(
    before: dict[str, int], after: dict[str, int], answers: Sequence[Answer], say: Say
) -> None:
    if all(answer.trace.complete for answer in answers):
        return
    causes = {cause: after[cause] - before.get(cause, 0) for cause in after}
    text = ", ".join(f"{cause} {count:,}" for cause, count in causes.items() if count)
    say(f"tokens missing from traces that ended meanwhile, by cause: {text or 'none'}")


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.2%}"
