"""Repeats everything that is claimed of the GPU, and writes the result file as it goes.

On a machine with an NVIDIA GPU, vLLM 0.32.0 and moescope::

    python -m tests.gpu.measure --model Qwen/Qwen1.5-MoE-A2.7B-Chat --gsm8k test.jsonl \
        --out result.json [-- VLLM FLAGS]

Each part replaces its entry in the file as soon as it is done: what was measured stays where the
run is cut off. ``--part`` runs one part, ``--scale 0.2`` a shorter version of all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import importlib.metadata
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from moescope import Client, datasets, environment
from moescope.servers import (
    Server,
    captured_command,
    free_ports,
    stock_command,
    stock_env,
    wait_ready,
)
from moescope_service.versions import versions
from tests.gpu import fidelity, tap, throughput

PARTS = ("fidelity_v2", "fidelity_v1", "stock_routing", "throughput")
START_TIMEOUT_S = 420.0
TAP_ROWS = 12_000
STOCK_QUESTIONS = 50


class Result:
    """The result file; every change is written at once."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self._path = path
        self.values: dict[str, Any] = orjson.loads(path.read_bytes()) if path.exists() else {}
        self["date"] = now()
        self["command"] = shlex.join(["python", "-m", "tests.gpu.measure", *sys.argv[1:]])
        self["hardware"] = {**environment.hardware(), "gpu": gpu()}
        self["versions"] = {**environment.system(), **packages()}

    def __setitem__(self, key: str, value: Any) -> None:
        self.values[key] = value
        options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
        self._path.write_bytes(orjson.dumps(self.values, option=options))


def now() -> str:
    """Return the date and time."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def gpu() -> str:
    """Return the GPU's name, memory and driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def packages() -> dict[str, str]:
    """Return the versions of what the result depends on."""
    return {**versions(), "triton": importlib.metadata.version("triton")}


@contextlib.contextmanager
def servers(
    args: argparse.Namespace, arms: Sequence[tuple[str, list[str], dict[str, str]]]
) -> Iterator[dict[str, Server]]:
    """Start servers side by side: (name, command without address, environment)."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name, command, env in arms:
            (port,) = free_ports(1)
            address = ["--host", "127.0.0.1", "--port", str(port)]
            log = args.out.with_name(f"{args.out.stem}_{name}.log")
            url = f"http://127.0.0.1:{port}"
            server = Server(name, [*command, *address], url, log, env)
            started[name] = stack.enter_context(server)
        wait_ready(list(started.values()), START_TIMEOUT_S)
        yield started


def run_fidelity(args: argparse.Namespace, questions: Sequence[str], runner: str) -> dict[str, Any]:
    """Serve with both captures on and compare them."""
    tapped = args.tap_directory / runner
    tapped.mkdir()
    env = {
        **os.environ,
        **tap.environment(args.tap_directory, gate_scale=args.gate_scale),
        **tap.saving(tapped, TAP_ROWS),
        **fidelity.runner_env(runner),
    }
    command = captured_command([args.model, *args.vllm])
    if runner == "v2":  # vLLM's own capture needs it
        command.append("--enable-return-routed-experts")
    with servers(args, [(f"fidelity_{runner}", command, env)]) as started:
        (server,) = started.values()
        answers = asyncio.run(fidelity.ask_all(server.url, questions, concurrency=128))
        with Client(server.url) as client:
            info = client.info()
        return {
            "model_runner": runner,
            "command": shlex.join(["python", *server.command[1:]]),
            "router_types": info.router_types,
            "ids_against_vllm": fidelity.compare_ids(answers) if runner == "v2" else None,
            "coverage": fidelity.coverage(server.url, answers),
            "against_router_logits": fidelity.compare_logits(server.url, tapped),
        }


def run_stock_routing(args: argparse.Namespace, questions: Sequence[str]) -> dict[str, Any]:
    """Compare routes of a server with moescope with those of two that have nothing of it."""
    flags = [*side_by_side(args), "--enable-return-routed-experts"]
    stock = stock_command(["--model", args.model, *flags])
    env = {**os.environ, **tap.environment(args.tap_directory, gate_scale=args.gate_scale)}
    arms = [
        (throughput.STOCK, stock, stock_env(env)),
        (throughput.STOCK_AGAIN, stock, stock_env(env)),
        (throughput.MOESCOPE, captured_command([args.model, *flags]), env),
    ]
    with servers(args, arms) as started:
        return fidelity.compare_stock({n: s.url for n, s in started.items()}, questions)


def side_by_side(args: argparse.Namespace) -> list[str]:
    """Return vLLM's flags for servers that share the GPU.

    Their KV cache is given, not profiled: starting together, they would count each other's memory.
    """
    cache = ["--kv-cache-memory-bytes", str(args.kv_cache_bytes)]
    return [*args.vllm, *cache, "--gpu-memory-utilization", "0.2"]


def run_throughput(args: argparse.Namespace, questions: Sequence[str], result: Result) -> None:
    """Alternate loads between stock vLLM, stock vLLM again, and moescope."""
    share = side_by_side(args)
    stock = stock_command(["--model", args.model, *share])
    env = {**os.environ, **tap.environment(args.tap_directory, gate_scale=args.gate_scale)}
    arms = [
        (throughput.STOCK, stock, stock_env(env)),
        (throughput.STOCK_AGAIN, stock, stock_env(env)),
        (throughput.MOESCOPE, captured_command([args.model, *share]), env),
    ]
    measured = result.values.get("throughput", {})
    with servers(args, arms) as started:
        urls = {name: server.url for name, server in started.items()}
        for load in throughput.loads(questions, args.scale):
            if args.load and not load.name.startswith(tuple(args.load)):
                continue
            values = asyncio.run(throughput.measure(load, urls))
            measured[load.name] = {"date": now(), **values}
            result["throughput"] = measured
            shown = {key: value for key, value in values.items() if key != "seconds"}
            print(load.name, orjson.dumps(shown).decode(), flush=True)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="The model's directory or name.")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's test.jsonl; the hub by default.")
    parser.add_argument("--out", type=Path, required=True, help="The result file.")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--load", action="append", help="Throughput: loads that start like this.")
    parser.add_argument("--limit", type=int, default=1319, help="Questions of the fidelity part.")
    parser.add_argument("--scale", type=float, default=1.0, help="Share of the rounds to run.")
    parser.add_argument(
        "--kv-cache-bytes", type=int, default=13 * 2**30, help="KV cache of each of three servers."
    )
    parser.add_argument(
        "--gate-scale", type=float, help="For --load-format dummy: sharpens the gates; try 1e5."
    )
    parser.add_argument("vllm", nargs="*", help="After --: vLLM's flags for every server.")
    return parser.parse_args()


def main() -> None:
    """Run the parts that were asked for."""
    args = parse()
    questions = [item.question for item in datasets.load("gsm8k", args.gsm8k)]
    result = Result(args.out, args)
    with tempfile.TemporaryDirectory() as directory:
        args.tap_directory = Path(directory)
        tap.install(args.tap_directory)
        for part in args.part or PARTS:
            run_part(part, args, questions, result)


def run_part(part: str, args: argparse.Namespace, questions: Sequence[str], result: Result) -> None:
    """Run one part and put it into the result."""
    if part == "throughput":
        run_throughput(args, questions, result)
        return
    if part == "stock_routing":
        result[part] = run_stock_routing(args, questions[:STOCK_QUESTIONS])
    else:
        result[part] = run_fidelity(args, questions[: args.limit], part[-2:])
    print(orjson.dumps(result.values[part]).decode(), flush=True)


if __name__ == "__main__":
    main()
