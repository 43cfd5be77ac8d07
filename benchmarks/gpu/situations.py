"""Shows that rows are right in layouts of several GPUs, with drafters, in hybrids, after sleep.

Each case serves a checkpoint of random weights in a model's shape and sends requests whose prompts
begin alike: all at once, then some of one token, one after the other, so that of several engines
all but one are idle. Every row is judged by HF transformers as `moescope verify` judges it, and
vLLM's own capture runs beside wherever it can. A case's entry is in the file when it is done. It
exits with 1 where a row is wrong or missing, or a case did not do what it is for::

    python -m benchmarks.gpu.situations --tokenizer DIRECTORY --out runs/situations.json \
        --device cuda --case tp2 --case pp2 -- --max-num-seqs 64
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson

from benchmarks import result
from benchmarks.gpu import judged, random_checkpoint, shapes
from moescope.servers import end_servers_on_signals
from moescope_service.verify.completions import RoutedCompletion, VerifiedServer
from moescope_service.verify.reference import Reference

MAX_TOKENS = 32
LONELY = 12
"""Requests of one token, one after the other."""
COUNTS_S = 3.0
"""Where experts are only counted, workers tell of them once a second."""
_EPLB = {"num_redundant_experts": 4, "window_size": 16, "step_interval": 16}
_MTP = {
    "method": "mtp",
    "num_speculative_tokens": 2,
    # Of random weights no draft would be accepted.
    "rejection_sample_method": "synthetic",
    "synthetic_acceptance_length": 2.0,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """What is served, and what must be seen."""

    flags: tuple[str, ...]
    shape: str = "qwen2-moe"
    layers: int = 4
    gpus: int = 1
    vllm_captures: bool = True
    is_judged: bool = True
    """Whether HF transformers computes what vLLM does; not where weights are quantized."""
    prefix_tokens: tuple[int, int] = (64, 480)
    between: Callable[[httpx.Client, Path], None] | None = None
    """What is done to the server, after which all prompts are sent once more."""
    env: tuple[tuple[str, str], ...] = ()
    says: str = ""
    """What the server's log must say at least twice."""
    only_counts: bool = False
    """Whether the server counts experts and keeps no rows."""

    @property
    def has_drafter(self) -> bool:
        """Whether tokens are drafted."""
        return "--speculative-config" in self.flags


def sleep_and_wake(http: httpx.Client, model: Path) -> None:
    """Let the server sleep and wake: weights kept, then weights read again."""
    _post(http, "/sleep", level=1)
    _post(http, "/wake_up")
    _post(http, "/sleep", level=2)
    _post(http, "/wake_up", tags="weights")
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
    http.post("/collective_rpc", json=reload).raise_for_status()
    _post(http, "/wake_up", tags="kv_cache")


def _post(http: httpx.Client, path: str, **params: Any) -> None:
    http.post(path, params=params).raise_for_status()


_TWO_ENGINES = ("--data-parallel-size", "2", "--enable-expert-parallel")
CASES = {
    "tp2": Case(("--tensor-parallel-size", "2"), gpus=2),
    "pp2": Case(("--pipeline-parallel-size", "2"), gpus=2, vllm_captures=False),
    "dp2_ep": Case((*_TWO_ENGINES, "--api-server-count", "2"), gpus=2),
    # vLLM 0.32.0 balances no experts of Qwen2-MoE, and does not say so; and it may move experts
    # while it captures CUDA graphs, which fails.
    "dp2_ep_eplb": Case(
        (*_TWO_ENGINES, "--enable-eplb", "--eplb-config", json.dumps(_EPLB), "--enforce-eager"),
        "qwen3-moe",
        gpus=2,
        says=r"Rearranging experts \S+ mode\)? *\.\.\.",
    ),
    "dp2_ep_counts": Case(
        (*_TWO_ENGINES, "--routes-mode", "counts", "--no-enable-prefix-caching"),
        gpus=2,
        vllm_captures=False,
        is_judged=False,
        only_counts=True,
    ),
    "mtp": Case(("--speculative-config", json.dumps(_MTP)), "deepseek-v3", 3),
    "hybrid": Case(
        ("--gdn-prefill-backend", "triton", "--enable-prefix-caching"),
        "qwen3-next",
        prefix_tokens=(900, 1900),
    ),
    "fp8": Case(("--quantization", "fp8"), "qwen3-moe", is_judged=False),
    "sleep": Case(
        ("--enable-sleep-mode",),
        between=sleep_and_wake,
        env=(("VLLM_SERVER_DEV_MODE", "1"),),
        says="Sleep mode freed",
    ),
}


def serve(
    case: Case, model: Path, log: Path, args: argparse.Namespace
) -> tuple[dict[str, Any], list[RoutedCompletion]]:
    """Serve a case and send its requests; return what is seen without a reference, and them."""
    vllm_captures = case.vllm_captures and args.own_capture
    flags = [
        *case.flags,
        "--max-model-len",
        "2048",
        *args.vllm,
        *[judged.OWN_CAPTURE] * vllm_captures,
    ]
    started_s = time.monotonic()
    with (
        judged.serving(log.stem, [str(model), *flags], log, dict(case.env)) as server,
        VerifiedServer(server.url, None) as verified,
    ):
        ready_s = time.monotonic() - started_s
        completions: list[RoutedCompletion] = []
        if case.only_counts:
            routed = complete(server.url, model, args.requests)
        else:
            completions = ask(case, server.url, verified, model, args.requests)
        info, missing = verified.client.info(), verified.missing()
        counted = verified.client.experts().counts.sum(-1)
        accepted = judged.counter(verified.metrics(), "vllm:spec_decode_num_accepted_tokens")
    said = len(re.findall(case.says, log.read_text(errors="replace"))) if case.says else None
    made = {
        "shape": f"{case.shape}, {case.layers} layers",
        "gpus": case.gpus,
        "flags": flags,
        "ready_s": round(ready_s, 1),
        "layers": info.layers,
        "top_k": info.top_k,
        "router_types": info.router_types,
        "requests": len(completions) or args.requests,
        "rows": {"computed": routed, "missing": 0}
        if case.only_counts
        else judged.rows(completions),
        "missing_by_cause": missing,
        "counted_by_layer": sorted(set(counted.tolist())),
        "drafts_accepted": accepted,
        "log_says": {case.says: said} if case.says else None,
        "against_vllm": judged.against_vllm(completions) if vllm_captures else None,
    }
    return made, completions


def ask(
    case: Case, url: str, verified: VerifiedServer, model: Path, number: int
) -> list[RoutedCompletion]:
    """Send a case's requests."""
    prompts = judged.make_prompts(number, 6, _vocabulary(model), case.prefix_tokens)
    completions = verified.complete(prompts, MAX_TOKENS)
    for prompt in prompts[:LONELY]:
        completions += verified.complete([prompt[::-1]], 1)
    if case.between is not None:
        with httpx.Client(base_url=url, timeout=300.0) as http:
            case.between(http, model)
        completions += verified.complete(prompts, MAX_TOKENS)
    return completions


def _vocabulary(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def complete(url: str, model: Path, number: int) -> int:
    """Send a case's prompts to a server that only counts; return how many tokens were routed."""
    body = {"model": str(model), "max_tokens": MAX_TOKENS, "ignore_eos": True}
    prompts = judged.make_prompts(number, 6, _vocabulary(model))
    with httpx.Client(base_url=url, timeout=300.0) as http, ThreadPoolExecutor(number) as pool:
        sent = pool.map(
            lambda one: http.post("/v1/completions", json={**body, "prompt": one}), prompts
        )
        routed: int = sum(
            one.raise_for_status().json()["usage"]["total_tokens"] - 1 for one in sent
        )
    time.sleep(COUNTS_S)
    return routed


def is_right(case: Case, made: dict[str, Any]) -> bool:
    """Return whether a case's result is what it must be."""
    rows, own, found = made["rows"], made["against_vllm"], made.get("judged")
    return (
        rows["missing"] == 0
        and (found is None or judged.is_good(found))
        and (own is None or own["rows"] == sum(rows.values()) == _told_alike(case, own))
        and (not case.says or made["log_says"][case.says] >= 2)
        # Rejected drafts are counted, and leave no row.
        and (case.has_drafter or made["counted_by_layer"] == [rows["computed"] * made["top_k"]])
        and (not case.has_drafter or made["drafts_accepted"] > 0)
    )


def _told_alike(case: Case, own: dict[str, int]) -> int:
    """Return how many rows vLLM has too; with a drafter, perhaps of another request."""
    return own["equal_rows"] + (own["equal_elsewhere"] if case.has_drafter else 0)


def checkpoint(case: Case, args: argparse.Namespace) -> Path:
    """Return the checkpoint of a case, written unless it is there."""
    directory: Path = args.out.parent
    shape, model = directory / f"{case.shape}.shape", directory / f"{case.shape}.model"
    if not model.exists():
        shapes.write(case.shape, shape, args.tokenizer)
        random_checkpoint.write(
            shape,
            model,
            layers=case.layers,
            device=args.device,
            drafter=case.has_drafter,
        )
    return model


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; that of this process where None."""
    parser = result.parser(__doc__ or "")
    parser.add_argument("--tokenizer", type=Path, required=True, help="A model's directory.")
    parser.add_argument("--case", choices=CASES, action="append", help="Repeat; all else.")
    parser.add_argument("--device", default="cpu", help="Where the reference runs.")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument(
        "--own-capture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Whether vLLM captures too, where it can; on a CPU it cannot.",
    )
    parser.add_argument("vllm", nargs="*", help="After --: vLLM's flags.")
    return parser.parse_args(arguments)


def write(out: Path, cases: dict[str, Any]) -> None:
    """Write all cases so far."""
    result.write(out, "benchmarks.gpu.situations", gpu=result.gpu(), cases=cases)


def main() -> int:
    """Run what the command line names; return the exit status."""
    args = parse()
    end_servers_on_signals()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cases = orjson.loads(args.out.read_bytes())["cases"] if args.out.exists() else {}
    status = 0
    for name in args.case or CASES:
        case = CASES[name]
        model = checkpoint(case, args)
        cases[name], completions = serve(case, model, args.out.parent / f"{name}.log", args)
        if case.is_judged:
            write(args.out, cases)  # a reference may take long
            layers = cases[name]["layers"]
            reference = Reference(str(model), layers, "float64", "bfloat16", args.device)
            cases[name]["judged"] = judged.judge(completions, reference)
        write(args.out, cases)
        right = is_right(case, cases[name])
        status |= not right
        print(f"{'ok' if right else 'WRONG'}: {name}: {orjson.dumps(cases[name]).decode()}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
