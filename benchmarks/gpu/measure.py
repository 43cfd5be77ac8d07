"""Repeats everything that is claimed of the GPU, and writes the result file as it goes.

On a machine with an NVIDIA GPU, vLLM 0.32.0 and moescope::

    python -m benchmarks.gpu.measure --model Qwen/Qwen1.5-MoE-A2.7B-Chat --gsm8k test.jsonl \
        --out result.json [-- VLLM FLAGS]

Each part replaces its entry in the file as soon as it is done: what was measured stays where the
run is cut off. ``--part`` runs one part, ``--scale 0.2`` a shorter version of all; ``timeline``
says where the capture's time goes in single steps, ``kernels`` the GPU's in servers of their own.

The part throughput is written after every round, and each run of it adds a sitting. One server
takes all loads of the H200's 141 GB, its capture taken off and put back in between (see
`benchmarks.gpu.one_server`)::

    … --part throughput --placement one-server --kv-cache-gib 92 \
        --load batch --load "64 con" --load 256 --load prefill --load GSM8K -- --max-model-len 8192

Three servers of their own fit side by side::

    … --part throughput [--arm stock --arm counts --arm routed-experts] [--load "batch 1" …] \
        -- --max-model-len 8192

or run in turn, each started anew in every round, which takes all the loads that are named
(``--placement in-turn --rounds 3``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from benchmarks import result as results
from benchmarks.gpu import (
    fidelity,
    kernels,
    loads,
    one_server,
    options,
    tap,
    throughput,
    timeline,
)
from benchmarks.gpu.throughput import now
from moescope import Client, datasets, environment
from moescope.overhead import arms, hosting, timing
from moescope.overhead.arms import Arm, Model
from moescope.overhead.hosting import Launcher, StartedArms
from moescope.run_dir import RunDir
from moescope.servers import end_servers_on_signals, wait_ready
from moescope_service.vllm_contract.versions import versions

START_TIMEOUT_S = 420.0
TAP_ROWS = 12_000
STOCK_QUESTIONS = 50
UNPADDED = {"TORCHINDUCTOR_SHAPE_PADDING": "0"}
"""Whether a router's logits of 60 columns are padded to 64 is decided by a stopwatch in every
compilation, and vLLM misreads padded ones (its issue 56900): equal servers would route unlike. What
the environment says of it counts."""


class Result:
    """The result file; every change is written at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = orjson.loads(path.read_bytes()) if path.exists() else {}
        self.circumstances = {
            "date": now(),
            "commit": results.commit(),
            "command": shlex.join(["python", "-m", "benchmarks.gpu.measure", *sys.argv[1:]]),
            "hardware": {**environment.hardware(), "gpu": results.gpu()},
            "versions": {**environment.system(), **packages()},
            "environment": unpadded(),
        }
        self.values |= self.circumstances

    def __setitem__(self, key: str, value: Any) -> None:
        self.values[key] = value
        timing.write(self._path, self.values)


def packages() -> dict[str, str]:
    """Return the versions of what the result depends on."""
    try:
        return {**versions(), "triton": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:  # on the CPU
        return versions()


def unpadded() -> dict[str, str]:
    """Return `UNPADDED`, or what the environment says in its place."""
    return {name: os.environ.get(name, value) for name, value in UNPADDED.items()}


def launcher(args: argparse.Namespace, flags: Sequence[str], env: dict[str, str]) -> Launcher:
    """Return what starts the servers: with these flags of vLLM and more of the environment."""
    return Launcher(
        model=Model(path=args.model, served_name=Path(args.model).name, args=flags),
        run_dir=RunDir(args.out.parent),
        timeout_s=START_TIMEOUT_S,
        tell=lambda text: print(text, flush=True),
        suspends_idle=False,  # they do not share cores, see throughput.Sitting
        env={
            **os.environ,
            **unpadded(),
            **tap.environment(args.tap_directory, gate_scale=args.gate_scale),
            **env,
        },
    )


def run_fidelity(args: argparse.Namespace, questions: Sequence[str], runner: str) -> dict[str, Any]:
    """Serve with both captures on and compare them."""
    tapped = args.tap_directory / runner
    tapped.mkdir()
    env = {**tap.saving(tapped, TAP_ROWS), **fidelity.runner_env(runner)}
    # vLLM's own capture needs the V2 runner.
    has_own = runner == "v2" and args.own_capture
    own = ["--enable-return-routed-experts"] if has_own else []
    start = launcher(args, [*args.vllm, *own], env)
    with start.server(Arm(name=f"fidelity_{runner}")) as server:
        wait_ready([server], START_TIMEOUT_S)
        answers = asyncio.run(fidelity.ask_all(server.url, questions, concurrency=128))
        with Client(server.url) as client:
            info = client.info()
        return {
            "model_runner": runner,
            "command": shlex.join(["python", *server.command[1:]]),
            "router_types": info.router_types,
            "ids_against_vllm": fidelity.compare_ids(answers) if has_own else None,
            "coverage": fidelity.coverage(server.url, answers),
            "against_router_logits": fidelity.compare_logits(server.url, tapped, Path(args.model)),
        }


def run_stock_routing(args: argparse.Namespace, questions: Sequence[str]) -> dict[str, Any]:
    """Compare routes of a server with moescope with those of two that have nothing of it."""
    flags = [*shared(args), "--enable-return-routed-experts"]
    chosen = arms.parse_all(arms.DEFAULT)
    with hosting.start_arms(launcher(args, flags, {}), chosen, "together") as ready:
        urls = {}
        for name in ready.names:
            with ready.arrangement.visit(name) as url:
                urls[name] = url
        return fidelity.compare_stock(urls, questions)


def run_timeline(args: argparse.Namespace) -> dict[str, Any]:
    """Serve with moescope and look into its steps."""
    directory = args.tap_directory / "timeline"
    directory.mkdir()
    picked = [one for one in loads.workloads() if one.every_arm]
    start = launcher(args, [*args.vllm, *kv_cache(args)], tap.profiling(directory))
    with start.server(Arm(name=arms.MOESCOPE)) as server:
        wait_ready([server], START_TIMEOUT_S)
        return timeline.measure(server.url, start.model.served_name, directory, picked)


def run_kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Profile steps of servers of their own."""
    directory = args.tap_directory / "kernels"
    directory.mkdir()
    start = launcher(args, [*shared(args), *kernels.flags(directory)], {})
    chosen = [Arm(name=name) for name in args.arm]
    with hosting.start_arms(start, chosen, "together") as ready:
        first = loads.workloads()[0]
        found = kernels.measure(ready, directory, first)
    print(*kernels.statements(found), sep="\n", flush=True)
    return {first.name: found, "refused": ready.refused}


def kv_cache(args: argparse.Namespace) -> list[str]:
    """Return vLLM's flags for a KV cache of the size that was asked for."""
    return ["--kv-cache-memory-bytes", str(int(args.kv_cache_gib * 2**30))]


def shared(args: argparse.Namespace) -> list[str]:
    """Return vLLM's flags for servers that share the GPU.

    Their KV cache is given, not profiled: starting together, they would count each other's memory.
    """
    return [*args.vllm, *kv_cache(args), "--gpu-memory-utilization", "0.2"]


def run_throughput(args: argparse.Namespace, questions: Sequence[str], result: Result) -> None:
    """Put loads on the arms that were chosen; add a sitting to the result."""
    picked = options.pick(args, questions)
    chosen = [Arm(name=name) for name in args.arm]
    with sitting(args, chosen) as (start, ready):
        name = str(result.circumstances["date"])
        result["sittings"] = {
            **result.values.get("sittings", {}),
            name: circumstances(args, result, ready, start.commands(chosen)),
        }

        def on_round(workload: loads.Workload, measured: dict[str, Any]) -> None:
            found = result.values.get("loads", {})
            result["loads"] = throughput.add(found, workload, name, measured)
            if measured["complete"]:
                print(*throughput.statements(workload, measured), sep="\n", flush=True)

        throughput.Sitting(chosen, ready).measure(picked, on_round)


@contextlib.contextmanager
def sitting(
    args: argparse.Namespace, chosen: Sequence[Arm]
) -> Iterator[tuple[Launcher, StartedArms]]:
    """Start servers for a sitting, or make ready to start them; end them afterwards."""
    if args.placement == "one-server":
        state = args.tap_directory / "capture.state"
        start = launcher(args, [*args.vllm, *kv_cache(args)], tap.switching(state))
        with one_server.start_arms(start, [arm.name for arm in chosen], state) as ready:
            yield start, ready
    else:
        start = launcher(args, shared(args), {})
        with hosting.start_arms(start, chosen, args.placement) as ready:
            yield start, ready


def circumstances(
    args: argparse.Namespace, result: Result, ready: StartedArms, commands: dict[str, str]
) -> dict[str, Any]:
    """Return what a sitting was measured with."""
    return {
        **result.circumstances,
        "model": Path(args.model).name,
        "placement": args.placement,
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "commands": commands,
        "refused": ready.refused,
    }


def main() -> None:
    """Run the parts that were asked for."""
    args = options.parse()
    end_servers_on_signals()
    questions = [item.question for item in datasets.load("gsm8k", args.gsm8k)]
    result = Result(args.out)
    with tempfile.TemporaryDirectory() as directory:
        args.tap_directory = Path(directory)
        tap.install(args.tap_directory)
        for part in args.part or options.PARTS:
            run_part(part, args, questions, result)


def run_part(part: str, args: argparse.Namespace, questions: Sequence[str], result: Result) -> None:
    """Run one part and put it into the result."""
    if part == "throughput":
        run_throughput(args, questions, result)
        return
    if part == "timeline":
        result[part] = run_timeline(args)
    elif part == "kernels":
        result[part] = run_kernels(args)
    elif part == "stock_routing":
        result[part] = run_stock_routing(args, questions[:STOCK_QUESTIONS])
    else:
        result[part] = run_fidelity(args, questions[: args.limit], part[-2:])
    print(orjson.dumps(result.values[part]).decode(), flush=True)


if __name__ == "__main__":
    main()
