"""Shows that rows beside a KV connector are right, where blocks leave the cache and come back.

It writes a checkpoint of random weights, serves it with a connector and few blocks, and sends
requests whose prompts begin alike. Every row, whether it was computed, cached or recalled, is
judged by HF transformers as `moescope verify` judges it. It exits with 1 where a row is wrong::

    python -m benchmarks.gpu.offloading --shape DIRECTORY --out runs/offloading.json --device cuda \
        -- --kv-offloading-size 4 --num-gpu-blocks-override 400 --gpu-memory-utilization 0.25
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import result
from benchmarks.gpu import random_checkpoint
from moescope import Source
from moescope.servers import (
    Server,
    captured_command,
    end_servers_on_signals,
    free_ports,
    wait_ready,
)
from moescope_service.verify.comparison import Counts, Tolerance, compare
from moescope_service.verify.completions import RoutedCompletion, VerifiedServer
from moescope_service.verify.reference import Reference

MAX_TOKENS = 16
_PREFIX_TOKENS = (64, 480)
_OWN_TOKENS = (1, 60)
_START_TIMEOUT_S = 900.0
_HITS = re.compile(
    r"^(vllm:(?:external_)?prefix_cache_(?:queries|hits)_total)\{[^}]*\} (\S+)$", re.MULTILINE
)


def make_prompts(number: int, prefixes: int, vocabulary: int) -> list[list[int]]:
    """Return prompts, each of which begins with a part of one of some texts."""
    rng = np.random.default_rng(0)
    texts = rng.integers(10, vocabulary, (prefixes, _PREFIX_TOKENS[1]))
    prompts = []
    for _ in range(number):
        shared = texts[rng.integers(prefixes), : rng.integers(*_PREFIX_TOKENS, endpoint=True)]
        own = rng.integers(10, vocabulary, rng.integers(*_OWN_TOKENS, endpoint=True))
        prompts.append(np.concatenate([shared, own]).tolist())
    return prompts


def judge(completions: Sequence[RoutedCompletion], reference: Reference) -> dict[str, Any]:
    """Compare all rows, those of each source, and a control with the reference."""
    expected = [reference.follow(one.token_ids[:-1], one.trace) for one in completions]
    tolerance = Tolerance.of(expected, reference.eps)
    total, control = Counts(), Counts()
    by_source = {source: Counts() for source in Source if source != Source.MISSING}
    for one, want in zip(completions, expected, strict=True):
        for source, counts in by_source.items():
            kept = np.where(one.trace.source == source, source, Source.MISSING).astype(np.uint8)
            trace = dataclasses.replace(one.trace, source=kept)
            counts.add(compare(trace, want, tolerance, reference.route))
        # Each row against the next one's: it must fail.
        control.add(compare(one.trace, want, tolerance, reference.route, shift=1))
    for counts in by_source.values():
        total.add(counts)
    judged = {source.name.lower(): _shown(counts) for source, counts in by_source.items()}
    told = {"pairs": control.pairs - control.missing, "mismatches": control.mismatches}
    return {"all": _shown(total), **judged, "control": told}


def _shown(total: Counts) -> dict[str, Any]:
    return {
        "pairs": total.pairs - total.missing,
        "equal": total.equal,
        "near_ties": total.near_ties,
        "mismatches": total.mismatches,
        "wrong_weights": total.wrong_weights,
        "largest_gap_of_tolerance": round(total.largest_gap, 4),
        "differences": [str(one) for one in total.differences],
    }


def measure(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Serve the model, send the requests, and judge their rows."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    flags = ["--dtype", args.dtype, "--max-model-len", "1024", "--port", str(port), *args.vllm]
    command = captured_command([str(model), *flags])
    log = args.out.with_suffix(".log")
    with Server("offloading", command, url, log, dict(os.environ)) as server:
        wait_ready([server], _START_TIMEOUT_S)
        with VerifiedServer(url, None) as verified:
            info = verified.client.info()
            reference = Reference(str(model), info.layers, "float64", args.dtype, args.device)
            prompts = make_prompts(args.requests, args.prefixes, reference.vocab_size)
            started_s = time.monotonic()
            completions = verified.complete(prompts, MAX_TOKENS)
            seconds = time.monotonic() - started_s
            missing, hits = verified.missing(), dict(_HITS.findall(verified.metrics()))
    rows = np.concatenate([one.trace.source for one in completions])
    return {
        "flags": flags,
        "requests": len(completions),
        "seconds": round(seconds, 1),
        "rows": {one.name.lower(): int((rows == one).sum()) for one in Source},
        "missing_by_cause": missing,
        "vllm": {name: float(value) for name, value in hits.items()},
        "judged": judge(completions, reference),
    }


def main() -> int:
    """Do what the command line says; return the exit status."""
    parser = result.parser(__doc__ or "")
    parser.add_argument("--shape", type=Path, required=True, help="config.json and a tokenizer.")
    parser.add_argument("--layers", type=int, default=4, help="Of the shape, the first ones.")
    parser.add_argument("--dtype", default="bfloat16", help="What the server computes in.")
    parser.add_argument("--device", default="cpu", help="Where the reference runs.")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--prefixes", type=int, default=40, help="Texts that prompts begin with.")
    parser.add_argument("vllm", nargs="*", help="After --: vLLM's flags.")
    args = parser.parse_args()
    end_servers_on_signals()
    model = args.out.with_suffix(".model")
    if not model.exists():
        random_checkpoint.write(args.shape, model, layers=args.layers, device=args.device)
    measured = measure(args, model)
    result.write(args.out, "benchmarks.gpu.offloading", gpu=result.gpu(), **measured)
    print(args.out.read_text())
    judged = measured["judged"]["all"]
    return 1 if judged["mismatches"] or judged["wrong_weights"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
