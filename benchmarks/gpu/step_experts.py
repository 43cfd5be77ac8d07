"""Measures how a decode step's time follows its distinct experts, and draws it.

Each batch is generated twice on one server: of random prompts, sampled, so that tokens go their own
ways; and of one prompt as often, greedily, so that all tokens of a step go the same way and read
few experts. What else a step does is the same, so the two lines lie apart by what experts cost::

    python -m benchmarks.gpu.step_experts --model DIRECTORY --out runs/step_experts.json \
        --gate-scale 1e5 -- --load-format dummy --max-model-len 1024
    python -m benchmarks.gpu.step_experts --draw runs/step_experts.json --out step_experts.png

Distinct experts are those that the server tells (``/experts?per=step``), the time is the mean
between two tokens of an output on the engine's clock.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
from matplotlib.figure import Figure

from benchmarks import result
from benchmarks.gpu import judged, tap
from moescope.overhead import engine
from moescope.servers import end_servers_on_signals

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LOADS = {"random prompts": 1.0, "one prompt": 0.0}
"""The temperature of each."""
PROMPT_TOKENS = 32
TIMEOUT_S = 300.0
_BYTES_A_GB = 1e9


def generate(http: httpx.Client, model: str, prompts: list[list[int]], temperature: float,
             tokens: int) -> None:  # fmt: skip
    """Generate from all prompts at once: they arrive in one request."""
    body = {
        "model": model,
        "prompt": prompts,
        "max_tokens": tokens,
        "temperature": temperature,
        "ignore_eos": True,
    }
    http.post("/v1/completions", json=body).raise_for_status()


def measure_batch(http: httpx.Client, model: str, load: str, batch: int, args: argparse.Namespace,
                  rng: np.random.Generator) -> dict[str, Any]:  # fmt: skip
    """Generate some rounds of a batch; return what its decode steps read and took."""
    rounds = []
    for _ in range(args.rounds):
        prompts = rng.integers(50, 450, (batch, PROMPT_TOKENS))
        if load == "one prompt":
            prompts[:] = prompts[0]
        http.post("/routes/reset").raise_for_status()
        before = engine.read_counters(str(http.base_url))
        generate(http, model, prompts.tolist(), LOADS[load], args.tokens)
        after = engine.read_counters(str(http.base_url))
        number = after[engine.ITLS] - before[engine.ITLS]
        rounds.append({
            "step_ms": 1e3 * (after[engine.ITL_S] - before[engine.ITL_S]) / number,
            **decode_steps(http, batch),
        })  # fmt: skip
    return {name: [one[name] for one in rounds] for name in rounds[0]}


def decode_steps(http: httpx.Client, batch: int) -> dict[str, float]:
    """Return means over the decode steps of a batch since the reset, of all layers."""
    told = http.get("/experts", params={"per": "step"}).raise_for_status().json()
    (found,) = (
        one
        for one in told["engines"][0]["steps"]
        if one["kind"] == "decode" and one["min_tokens"] == batch
    )
    return {
        "steps": found["steps"],
        "distinct_experts": float(np.mean(found["distinct_experts"])),
        "expert_gb": (found["expert_bytes"] or 0) / _BYTES_A_GB,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Serve the model and measure all batches of both loads."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        tap.install(Path(directory))
        env = tap.environment(Path(directory), gate_scale=args.gate_scale)
        log = args.out.with_suffix(".log")
        with (
            judged.serving("step_experts", [args.model, *args.vllm], log, env) as server,
            httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as http,
        ):
            (listed,) = http.get("/v1/models").raise_for_status().json()["data"]
            model = listed["id"]
            for batch in args.batch:  # first steps of a size are slower
                generate(http, model, [[100] * PROMPT_TOKENS] * batch, 0.0, 8)
            told = http.get("/experts", params={"per": "step"}).raise_for_status().json()
            loads = {
                load: {
                    batch: measure_batch(http, model, load, batch, args, rng)
                    for batch in args.batch
                }
                for load in LOADS
            }
    return {
        "model": Path(args.model).name,
        "layers": len(told["layers"]),
        "num_experts": told["num_experts"],
        "top_k": told["top_k"],
        "loads": loads,
    }


def draw(measured: dict[str, Any]) -> Figure:
    """Draw distinct experts and the step's time by batch size: medians, and all that was seen."""
    experts, top_k = measured["num_experts"], measured["top_k"]
    panels = {
        "distinct_experts": f"distinct experts a layer and step, of {experts}",
        "step_ms": "time of a step, ms",
    }
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for color, (load, batches) in zip(("C0", "C3"), measured["loads"].items(), strict=True):
            sizes = [int(one) for one in batches]
            values = np.array([one[metric] for one in batches.values()])
            axis.plot(sizes, np.median(values, 1), "o-", color=color, markersize=4, label=load)
            axis.fill_between(sizes, values.min(1), values.max(1), color=color, alpha=0.2)
        if metric == "distinct_experts":
            uniform = [experts * (1 - (1 - top_k / experts) ** size) for size in sizes]
            axis.plot(sizes, uniform, "--", color="gray", linewidth=1, label="uniform routing")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set(xlabel="sequences in a decode step", title=title)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(frameon=False)
    return figure


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = result.parser(__doc__ or "")
    parser.add_argument("--draw", type=Path, help="Draw this result; measure nothing.")
    parser.add_argument("--model", help="The model's directory or name.")
    parser.add_argument("--batch", type=int, action="append", choices=BATCHES, help="Repeat.")
    parser.add_argument("--rounds", type=int, default=5, help="Of each batch.")
    parser.add_argument("--tokens", type=int, default=96, help="Of each output.")
    parser.add_argument("--gate-scale", type=float, help="For --load-format dummy; try 1e5.")
    parser.add_argument("vllm", nargs="*", help="After --: vLLM's flags.")
    args = parser.parse_args()
    if not (args.draw or args.model):
        parser.error("--model: say what to serve, or --draw a result")
    args.batch = args.batch or list(BATCHES)
    return args


def main() -> None:
    """Do what the command line says."""
    args = parse()
    if args.draw:
        draw(orjson.loads(args.draw.read_bytes())).savefig(args.out, dpi=150)
        return
    end_servers_on_signals()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    measured = measure(args)
    result.write(args.out, "benchmarks.gpu.step_experts", gpu=result.gpu(), **measured)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
