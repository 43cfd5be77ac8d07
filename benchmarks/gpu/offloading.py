"""Shows that rows beside a KV connector are right, where blocks leave the cache and come back.

It writes a checkpoint of random weights, serves it with a connector and few blocks, and sends
requests whose prompts begin alike. Every row, whether it was computed, cached or recalled, is
judged by HF transformers as `moescope verify` judges it. It exits with 1 where a row is wrong::

    python -m benchmarks.gpu.offloading --shape DIRECTORY --out runs/offloading.json --device cuda \
        -- --kv-offloading-size 4 --num-gpu-blocks-override 400 --gpu-memory-utilization 0.25
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks import result
from benchmarks.gpu import judged, random_checkpoint
from moescope.servers import end_servers_on_signals
from moescope_service.verify.completions import VerifiedServer
from moescope_service.verify.reference import Reference

MAX_TOKENS = 16
_HITS = tuple(
    f"vllm:{kind}prefix_cache_{what}" for kind in ("", "external_") for what in ("queries", "hits")
)


def measure(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Serve the model, send the requests, and judge their rows."""
    flags = ["--dtype", args.dtype, "--max-model-len", "1024", *args.vllm]
    log = args.out.with_suffix(".log")
    with (
        judged.serving("offloading", [str(model), *flags], log) as server,
        VerifiedServer(server.url, None) as verified,
    ):
        layers = verified.client.info().layers
        reference = Reference(str(model), layers, "float64", args.dtype, args.device)
        prompts = judged.make_prompts(args.requests, args.prefixes, reference.vocab_size)
        started_s = time.monotonic()
        completions = verified.complete(prompts, MAX_TOKENS)
        seconds = time.monotonic() - started_s
        missing, metrics = verified.missing(), verified.metrics()
    return {
        "flags": flags,
        "requests": len(completions),
        "seconds": round(seconds, 1),
        "rows": judged.rows(completions),
        "missing_by_cause": missing,
        "vllm": {name: judged.counter(metrics, name) for name in _HITS},
        "against_vllm": judged.against_vllm(completions) if judged.OWN_CAPTURE in flags else None,
        "judged": judged.judge(completions, reference),
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
    return 0 if judged.is_good(measured["judged"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
