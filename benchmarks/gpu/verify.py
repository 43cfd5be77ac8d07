"""Shows that `moescope verify` passes a server that is right, and no other.

It writes a checkpoint of random weights, serves it in each dtype, and verifies it as it is and with
each of `benchmarks.fidelity.planted.FAULTS`. It exits with 1 where one exit status is another than
it must be. What was verified, and what came out, stands in ``verify.json``::

    python -m benchmarks.gpu.verify --shape DIRECTORY --out runs/verify --device cuda \
        -- --gpu-memory-utilization 0.25
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import result
from benchmarks.fidelity.planted import FAULTS, planted
from benchmarks.gpu import judged, random_checkpoint
from moescope.servers import end_servers_on_signals

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What one call of ``moescope verify`` said."""

    wanted: int
    """The exit status that it must have."""
    exit: int
    seconds: float
    report: list[str]
    """Its lines."""


def verify_all(
    url: str, model: Path, options: Sequence[str], faults: Sequence[str]
) -> dict[str, Outcome]:
    """Verify a server, as it is and with each fault."""
    outcomes = {"as it is": _verify(0, url, model, options)}
    for fault in faults:
        with planted(url, fault) as faulty:
            outcomes[fault] = _verify(1, faulty, model, options)
    for name, one in outcomes.items():
        is_right = one.exit == one.wanted
        print(f"{'ok' if is_right else 'WRONG'}: {name}: exit {one.exit}, wanted {one.wanted}")
    return outcomes


def _verify(wanted: int, url: str, model: Path, options: Sequence[str]) -> Outcome:
    command = [sys.executable, "-P", "-m", "moescope", "verify"]
    command += ["--base-url", url, "--model", str(model), *options]
    print(f"$ {' '.join(command[2:])}", flush=True)
    started_s = time.monotonic()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    seconds = round(time.monotonic() - started_s, 1)
    print(f"{done.stdout}exit {done.returncode}, {seconds:.0f} s\n", flush=True)
    return Outcome(wanted, done.returncode, seconds, done.stdout.splitlines())


def serve_and_verify(args: argparse.Namespace, model: Path, dtype: str) -> dict[str, Outcome]:
    """Serve the model in a dtype, and verify it."""
    flags = [str(model), "--dtype", dtype, *args.vllm]
    with judged.serving(dtype, flags, args.out / f"{dtype}.log") as server:
        print(f"== {dtype}", flush=True)
        options = ["--dtype", dtype, "--device", args.device, "--limit", str(args.limit)]
        options += ["--max-tokens", str(args.max_tokens)]
        return verify_all(server.url, model, options, args.fault or list(FAULTS))


def main() -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=Path, required=True, help="config.json and a tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="The checkpoint and the logs.")
    parser.add_argument("--layers", type=int, default=8, help="Of the shape, the first ones.")
    parser.add_argument("--device", default="cpu", help="Where the references run.")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="Repeat; bfloat16 else.")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="Repeat; all else.")
    parser.add_argument("--limit", type=int, default=8, help="Prompts.")
    parser.add_argument("--max-tokens", type=int, default=32, help="Output tokens at most.")
    parser.add_argument("vllm", nargs="*", help="After --: vLLM's flags.")
    args = parser.parse_args()
    end_servers_on_signals()
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.out / "model"
    if not model.exists():
        random_checkpoint.write(args.shape, model, layers=args.layers, device=args.device)
    outcomes = {}
    for dtype in args.dtype or ["bfloat16"]:
        outcomes[dtype] = serve_and_verify(args, model, dtype)
        result.write(
            args.out / "verify.json", "benchmarks.gpu.verify", gpu=result.gpu(), outcomes=outcomes
        )
    right = [one.exit == one.wanted for by_name in outcomes.values() for one in by_name.values()]
    return 0 if all(right) else 1


if __name__ == "__main__":
    raise SystemExit(main())
