"""``python -m benchmarks.soak``: a long load with faults; no row is wrong, and memory is flat.

A million requests of the simulated engine, and 50,000 of a real vLLM server, on the GPU where
vLLM's CUDA build is installed. Writes a JSON file for each of the two and a picture of memory over
time; returns 1 where one of them shows what is not to be. Each of the two may run by itself, with
0 requests of the other, in a directory of its own; with 0 of both, files that are in the directory
are judged and drawn.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.result import commit, gpu
from benchmarks.soak import picture, simulated
from moescope import environment
from moescope.servers import end_servers_on_signals
from moescope_service.vllm_contract.versions import versions

RESULTS = Path(__file__).parents[1] / "results" / "soak"
MAX_GROWTH_MIB = {"collector": 32.0, "simulated deployment": 32.0, "API server": 64.0}
"""By how much memory may be higher at the end than when stores were full, by process."""
MIN_COMPLETE = 0.75
"""Of the traces after the last fault: otherwise one was not undone. Rows are lost at random still
(`benchmarks.faults.served.CHANCES`)."""
MIN_REQUESTS = 10_000
"""Fewer do not fill caches: memory may grow."""


def problems(name: str, part: dict[str, Any]) -> list[str]:
    """Return what a part shows that is not to be."""
    found = [f"{part[one]} {one}" for one in ("complete_and_wrong", "wrong_rows") if part[one]]
    if name == "served":
        load, causes = part["load"], part["missing_by_cause"]
        new = {
            k: n
            for k, n in load["serving_errors"].items()
            if k not in part["stock"]["serving_errors"]
        }
        found += [f"serving errors that stock does not have: {new}"] if new else []
        found += [f"unexplained: {load['unexplained']}"] if load["unexplained"] else []
        if part["missing_rows_of_all_traces"] != sum(causes.values()):
            found.append(f"{part['missing_rows_of_all_traces']} missing rows, by cause {causes}")
        calm = part.get("after_faults", {"traces": 0, "complete": 0})
        if not calm["traces"] or calm["complete"] < MIN_COMPLETE * calm["traces"]:
            found.append(
                f"only {calm['complete']} of {calm['traces']} traces after the faults are complete"
            )
        killed = part["api_server_killed"]
        if killed["moescope"] != killed["stock"]:
            found.append(f"a killed API server ends differently: {killed}")
    num_requests = part["requests"] if name == "simulated" else part["load"]["requests"]
    for process, mib in part["grown_mib"].items() if num_requests >= MIN_REQUESTS else ():
        limits = [most for one, most in MAX_GROWTH_MIB.items() if process.startswith(one)]
        if limits and mib > limits[0]:
            found.append(f"{process} grew by {mib} MiB")
    return found


def main() -> int:
    """Run what is asked for; judge and draw all that stands in the directory."""
    args = _parser().parse_args()
    end_servers_on_signals()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.simulated:
        part = simulated.run(args.simulated, args.minutes, args.seed, args.workers)
        _write(args.out / "simulated.json", part)
    if args.served:
        _write(args.out / "served.json", _serve(args))
    files = {name: args.out / f"{name}.json" for name in ("simulated", "served")}
    parts = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if not parts:
        sys.exit(f"{args.out} has no results, and both --simulated and --served are 0")
    picture.draw(parts, args.out / "memory.png")
    found = [f"{name}: {one}" for name, part in parts.items() for one in problems(name, part)]
    print("\n".join(found) or "nothing is wrong")
    return int(bool(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--simulated", type=int, default=1_000_000, metavar="REQUESTS")
    parser.add_argument("--served", type=int, default=50_000, metavar="REQUESTS")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="The most that each load takes; 60."
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=cores,
        help="Processes that simulate, or that compare traces; one for each core.",
    )
    parser.add_argument("--concurrency", type=int, default=8, help="Clients of the servers; 8.")
    parser.add_argument("--fault-every-s", type=float, default=15.0, help="Of the servers; 15.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="A directory.")
    parser.add_argument("flags", nargs="*", help="After --: flags of vLLM for both servers.")
    return parser


def _serve(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.soak import served  # it needs torch and transformers

    return served.run(
        served.Plan(
            num_requests=args.served,
            minutes=args.minutes,
            seed=args.seed,
            fault_every_s=args.fault_every_s,
            concurrency=args.concurrency,
            workers=args.workers,
            flags=args.flags,
        )
    )


def _write(file: Path, part: dict[str, Any]) -> None:
    result = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "benchmarks.soak", *sys.argv[1:]]),
        "versions": versions() | environment.system(),
        "hardware": {**environment.hardware(), "gpu": gpu()},
        **part,
    }
    shown = {name: value for name, value in result.items() if name != "memory_mib"}
    print(json.dumps(shown, indent=2))
    file.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    sys.exit(main())
