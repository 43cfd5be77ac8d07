"""Verifies a running server on a few prompts, and reports in lines of text what matched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from moescope.errors import CommandError
from moescope.trace import Source
from moescope_service.verify.comparison import Counts, Tolerance, compare
from moescope_service.verify.completions import PrefixCache, RoutedCompletion, VerifiedServer

Say = Callable[[str], None]
MIN_CONTROL = 0.25
"""Share of wrong pairs that must be noticed as mismatches, for the comparison to prove anything."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What is verified, and against what."""

    against: Literal["transformers", "vllm"] = "transformers"
    """HF transformers with the same checkpoint, or vLLM's own ``routed_experts``."""
    model: str | None = None
    """The checkpoint; needed for HF transformers."""
    dtype: str | None = None
    """What the server computes in; what vLLM chooses for the checkpoint where None."""
    reference_dtype: str = "float64"
    device: str = "cpu"
    """Where the reference runs."""
    max_tokens: int = 32


def main(
    url: str,
    api_key: str | None,
    prompts: Sequence[str],
    say: Say,
    *,
    ca_cert: Path | None = None,
    **options: Any,
) -> bool:
    """Verify the server at an address; see `verify`, and `VerifyOptions` for the rest."""
    with VerifiedServer(url, api_key, verify=ca_cert or True) as server:
        return verify(server, prompts, VerifyOptions(**options), say)


def verify(
    server: VerifiedServer, prompts: Sequence[str], options: VerifyOptions, say: Say
) -> bool:
    """Verify a server.

    Args:
        server: The server.
        prompts: What to send to it.
        options: What to compare it with.
        say: Called with each line of the report.

    Returns:
        Whether all of it matched: no pair is missing, mismatched, or wrong in a weight.

    Raises:
        MoescopeError: The server does not respond, or it cannot be verified like this.
    """
    if options.against == "transformers" and options.model is None:
        raise CommandError("--model is missing: expected the checkpoint that is served")
    reference = _reference(server, options, say) if options.against == "transformers" else None
    before = server.missing()
    completions = server.complete(prompts, options.max_tokens)
    repeated = server.repeat(completions, options.max_tokens)
    completions += repeated
    _say_sequences(completions, say)
    _say_cache(server.prefix_cache(), repeated, say)
    if reference is None:
        is_good = _against_vllm(server, completions, say)
    else:
        is_good = _against_transformers(reference, completions, say)
    _say_missing(before, server.missing(), completions, say)
    say("everything matches" if is_good else "NOT everything matches")
    return is_good


def _say_sequences(completions: Sequence[RoutedCompletion], say: Say) -> None:
    rows = sum(one.trace.num_rows for one in completions)
    say(
        f"{len(completions)} sequences, {rows:,} routed tokens, {_cached(completions):,} of them "
        "from the prefix cache"
    )


def _say_cache(cache: PrefixCache, repeated: Sequence[RoutedCompletion], say: Say) -> None:
    """Say why the prefix cache was not seen to work, where it was not."""
    if not cache.is_on:
        say("  the server has prefix caching off")
    elif not repeated:
        say(f"  no prompt that the server takes has a whole block of {cache.block_tokens:,} tokens")
    elif not _cached(repeated):
        say(
            f"  a prompt of {repeated[0].trace.prompt_len:,} tokens was asked twice, but nothing "
            f"came from the prefix cache, whose blocks have {cache.block_tokens:,} tokens"
        )


def _cached(completions: Sequence[RoutedCompletion]) -> int:
    return sum(int((one.trace.source == Source.CACHED).sum()) for one in completions)


def _reference(server: VerifiedServer, options: VerifyOptions, say: Say) -> Any:
    layers = server.client.info().layers
    if not layers:
        raise CommandError("the server captures no layer: there is nothing to verify")
    from moescope_service.verify.reference import Reference

    assert options.model is not None  # noqa: S101
    reference = Reference(
        options.model, layers, options.reference_dtype, options.dtype, options.device
    )
    say(
        f"reference: HF transformers in {options.reference_dtype}, {reference.scheme.name}; "
        f"the server computes in {reference.server_dtype} (--dtype)"
    )
    return reference


def _against_transformers(
    reference: Any, completions: Sequence[RoutedCompletion], say: Say
) -> bool:
    expected = [reference.follow(one.token_ids[:-1], one.trace) for one in completions]
    tolerance = Tolerance.of(expected, reference.eps)
    total, control = Counts(), Counts()
    for one, want in zip(completions, expected, strict=True):
        total.add(compare(one.trace, want, tolerance, reference.route))
        control.add(compare(one.trace, want, tolerance, reference.route, shift=1))
    say(f"pairs (token, layer): {total.pairs:,}")
    say(f"  equal sets of experts: {total.equal:,} ({_share(total.equal, total.pairs)})")
    say(
        f"  near-ties in {reference.server_dtype}: {total.near_ties:,} "
        f"({_share(total.near_ties, total.pairs)}); the largest gap of all different pairs is "
        f"{total.largest_gap:.2f} of the tolerance"
    )
    say(f"  mismatches: {total.mismatches:,}")
    say(f"  missing: {total.missing:,}")
    say(
        f"  largest weight error: {total.largest_weight_error:.1e}; pairs beyond the tolerance: "
        f"{total.wrong_weights:,}"
    )
    _say_differences(total, say)
    wrong = control.mismatches / max(control.pairs - control.missing, 1)
    say(f"control, each pair against that of the next token: {wrong:.1%} mismatches")
    if wrong < MIN_CONTROL:
        say("  too many neighbors are equal for this to prove anything: use other prompts")
    return total.is_good and wrong >= MIN_CONTROL


def _say_differences(total: Counts, say: Say) -> None:
    for one in total.differences:
        say(f"  wrong: {one}")
    left = total.mismatches + total.wrong_weights - len(total.differences)
    if left:
        say(f"  … and {left:,} more")


def _against_vllm(
    server: VerifiedServer, completions: Sequence[RoutedCompletion], say: Say
) -> bool:
    if any(one.vllm_npy is None for one in completions):
        raise CommandError(
            "the server returns no expert ids of vLLM's own capture: start it with "
            "--enable-return-routed-experts"
        )
    whole = [one for one in completions if one.trace.complete]
    equal = [one for one in whole if server.npy(one.request_id) == one.vllm_npy]
    pairs, same = (
        sum(one.trace.num_rows * one.trace.num_layers for one in chosen)
        for chosen in (completions, equal)
    )
    missing = sum(int((~one.trace.present).sum()) * one.trace.num_layers for one in completions)
    say(
        f"pairs (token, layer): {pairs:,}, byte for byte vLLM's own: {same:,}, missing: {missing:,}"
    )
    return len(equal) == len(completions)


def _say_missing(
    before: dict[str, int],
    after: dict[str, int],
    completions: Sequence[RoutedCompletion],
    say: Say,
) -> None:
    if all(one.trace.complete for one in completions):
        return
    causes = {cause: after[cause] - before.get(cause, 0) for cause in after}
    text = ", ".join(f"{cause} {count:,}" for cause, count in causes.items() if count)
    say(f"rows missing from traces that ended during the run, by cause: {text or 'none'}")


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.2%}"
