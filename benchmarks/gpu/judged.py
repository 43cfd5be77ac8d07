"""Serves a checkpoint of random weights, and judges the rows of its requests by HF transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from moescope import Source
from moescope.servers import Server, captured_command, free_ports, wait_ready
from moescope_service.verify.comparison import Counts, Tolerance, compare
from moescope_service.verify.completions import RoutedCompletion
from moescope_service.verify.reference import Reference

OWN_CAPTURE = "--enable-return-routed-experts"
CONTROLS = 8
"""Sequences that are compared with other rows than their own; each such pair takes long."""
_OWN_TOKENS = (1, 60)
_START_TIMEOUT_S = 900.0


@contextlib.contextmanager
def serving(
    name: str, flags: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Serve with capture; yield the server when it is ready, end it afterwards.

    Args:
        name: For messages.
        flags: The model and vLLM's flags, but for the address.
        log: Where its output goes.
        env: Variables beyond this process's.
    """
    (port,) = free_ports(1)
    command = captured_command([*flags, "--host", "127.0.0.1", "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    with Server(name, command, url, log, {**os.environ, **(env or {})}) as server:
        wait_ready([server], _START_TIMEOUT_S)
        yield server


def make_prompts(
    number: int, prefixes: int, vocabulary: int, prefix_tokens: tuple[int, int] = (64, 480)
) -> list[list[int]]:
    """Return prompts, each of which begins with a part of one of some texts.

    Args:
        number: Of prompts.
        prefixes: Of texts.
        vocabulary: Tokens are below it.
        prefix_tokens: How many tokens of a text a prompt begins with: the fewest, the most.
    """
    rng = np.random.default_rng(0)
    texts = rng.integers(10, vocabulary, (prefixes, prefix_tokens[1]))
    prompts = []
    for _ in range(number):
        shared = texts[rng.integers(prefixes), : rng.integers(*prefix_tokens, endpoint=True)]
        own = rng.integers(10, vocabulary, rng.integers(*_OWN_TOKENS, endpoint=True))
        prompts.append(np.concatenate([shared, own]).tolist())
    return prompts


def rows(completions: Sequence[RoutedCompletion]) -> dict[str, int]:
    """Return how many rows come from each source."""
    source = np.concatenate([one.trace.source for one in completions])
    return {one.name.lower(): int((source == one).sum()) for one in Source}


def against_vllm(completions: Sequence[RoutedCompletion]) -> dict[str, int]:
    """Compare the experts of all rows with those of vLLM's own capture, which has all layers.

    vLLM 0.32.0 keeps rows by the hash of a block's tokens, the first that come
    (``distributed/aux_output_connector``). Where a request computes a cached block once more, as
    with MTP, it answers with the first ones, and near-ties may have become others: such rows are
    looked for in the traces of requests that begin with the same tokens (``equal_elsewhere``).
    """
    rows = equal = elsewhere = 0
    for one in completions:
        own = np.load(io.BytesIO(one.vllm_npy or b""))[:, one.trace.layers]
        is_equal = (own == one.trace.topk_ids).all((1, 2))
        rows += len(own)
        equal += int(is_equal.sum())
        for row in np.flatnonzero(~is_equal).tolist():
            begun = one.token_ids[: row + 1]
            elsewhere += any(
                np.array_equal(other.token_ids[: row + 1], begun)
                and np.array_equal(other.trace.topk_ids[row], own[row])
                for other in completions
            )
    return {
        "requests": len(completions),
        "rows": rows,
        "equal_rows": equal,
        "equal_elsewhere": elsewhere,
    }


def counter(metrics: str, name: str) -> float:
    """Return a counter's sum over its labels, of metrics as text."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == f"{name}_total"
    )


def judge(completions: Sequence[RoutedCompletion], reference: Reference) -> dict[str, Any]:
    """Compare all rows, those of each source, and a control with the reference."""
    expected = [reference.follow(one.token_ids[:-1], one.trace) for one in completions]
    tolerance = Tolerance.of(expected, reference.eps)
    total, control = Counts(), Counts()
    by_source = {source: Counts() for source in Source if source != Source.MISSING}
    for number, (one, want) in enumerate(zip(completions, expected, strict=True)):
        for source, counts in by_source.items():
            kept = np.where(one.trace.source == source, source, Source.MISSING).astype(np.uint8)
            trace = dataclasses.replace(one.trace, source=kept)
            counts.add(compare(trace, want, tolerance, reference.route))
        if number < CONTROLS:  # each row against the next one's: it must fail
            control.add(compare(one.trace, want, tolerance, reference.route, shift=1))
    for counts in by_source.values():
        total.add(counts)
    judged = {source.name.lower(): _shown(counts) for source, counts in by_source.items()}
    told = {"pairs": control.pairs - control.missing, "mismatches": control.mismatches}
    return {"all": _shown(total), **judged, "control": told}


def is_good(found: Mapping[str, Any]) -> bool:
    """Return whether no row is wrong, of what `judge` returns."""
    return not found["all"]["mismatches"] and not found["all"]["wrong_weights"]


def _shown(total: Counts) -> dict[str, Any]:
    return {
        "pairs": total.pairs - total.missing,
        "equal": total.equal,
        "near_ties": total.near_ties,
        "mismatches": total.mismatches,
        "wrong_weights": total.wrong_weights,
        "largest_weight_error": total.largest_weight_error,
        "largest_gap_of_tolerance": round(total.largest_gap, 4),
        "differences": [str(one) for one in total.differences],
    }
