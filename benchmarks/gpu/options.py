"""The options of `benchmarks.gpu.measure`, and what they refuse."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import loads, one_server
from moescope.overhead import arms

PARTS = ("fidelity_v2", "fidelity_v1", "stock_routing", "timeline", "kernels", "throughput")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Repeats what is claimed of the GPU: see benchmarks.gpu.measure."
    )
    parser.add_argument("--model", required=True, help="The model's directory or name.")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's test.jsonl; the hub by default.")
    parser.add_argument("--out", type=Path, required=True, help="The result file.")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument(
        "--load",
        action="append",
        help="Throughput: loads whose names start like this; all that fit side by side by default.",
    )
    parser.add_argument(
        "--arm",
        action="append",
        choices=dict.fromkeys((*arms.BUILT_IN, *one_server.ARMS)),
        help="Throughput, kernels: repeat; the first is what the others are compared with. By "
        "default stock, stock-again and moescope; in one server detached, detached-again, moescope "
        "and paused, or counts in place of the last two.",
    )
    parser.add_argument(
        "--placement",
        choices=("one-server", "together", "in-turn"),
        default="together",
        help="Throughput: whether arms share a server, or how servers share the GPU.",
    )
    parser.add_argument("--rounds", type=int, help="Throughput: rounds of every load.")
    parser.add_argument(
        "--concurrency", type=int, help="Throughput: conversations at a time, of every load."
    )
    parser.add_argument(
        "--stream-interval",
        type=int,
        help="Throughput: tokens that servers send at a time. Of 256 streams that come token by "
        "token, 18,000 chunks a second, API server and client lag behind the GPU.",
    )
    parser.add_argument("--limit", type=int, default=1319, help="Questions of the fidelity part.")
    parser.add_argument(
        "--own-capture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Fidelity on the V2 runner: whether vLLM captures too; some kernels it cannot.",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="Share of the rounds to run.")
    parser.add_argument("--kv-cache-gib", type=float, default=13.0, help="KV cache of each server.")
    parser.add_argument(
        "--gate-scale", type=float, help="For --load-format dummy: sharpens the gates; try 1e5."
    )
    parser.add_argument("vllm", nargs="*", help="After --: vLLM's flags for every server.")
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; refuse what cannot be measured.

    Args:
        arguments: Those of this process where None.
    """
    parser = _options()
    args = parser.parse_args(arguments)
    in_one = args.placement == "one-server"
    there_are, default = (
        (one_server.ARMS, one_server.DEFAULT) if in_one else (tuple(arms.BUILT_IN), arms.DEFAULT)
    )
    args.arm = args.arm or default
    if not set(args.arm) <= set(there_are) or not 2 <= len(args.arm) == len(set(args.arm)):
        parser.error(f"--arm: two or more of {', '.join(there_are)} are wanted, each once")
    if args.stream_interval is not None:
        if args.part != ["throughput"] or args.stream_interval < 1:
            parser.error("--stream-interval: 1 or more, and of --part throughput alone")
        args.vllm = [*args.vllm, "--stream-interval", str(args.stream_interval)]
    if in_one and args.part != ["throughput"]:
        parser.error("--placement one-server is one of --part throughput alone")
    if in_one and arms.COUNTS in args.arm and {arms.MOESCOPE, arms.PAUSED} & set(args.arm):
        parser.error("--arm: one server captures rows or counts them: take counts without the rest")
    return args


def pick(args: argparse.Namespace, questions: Sequence[str]) -> list[loads.Workload]:
    """Return the loads that were asked for."""
    return loads.pick(
        loads.workloads(questions, args.scale),
        args.load or (),
        rounds=args.rounds,
        concurrency=args.concurrency,
        stream_interval=args.stream_interval,
    )
