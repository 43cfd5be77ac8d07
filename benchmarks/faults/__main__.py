"""``python -m benchmarks.faults``: no failure of the transport makes a trace that lies.

10,000 requests on the simulated engine and 1,000 through real ZMQ and a real vLLM server on the
CPU; the short forms are ``tests/unit/test_faults.py`` and ``tests/e2e/test_restart.py``.
"""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.simulation.deployment import FAULTS, Chances, Deployment
from moescope import environment
from moescope_service.vllm_contract.versions import versions

RESULT = Path(__file__).parents[1] / "results" / "fidelity" / "faults.json"
REQUESTS_A_RUN = 20
SIMULATED = (
    Chances(rows_lost=0.1, abort=0.05, pause=0.05, speculation=0.4),
    Chances(kill=0.03, rows_lost=0.05, abort=0.03, pause=0.03, speculation=0.3),
    Chances(**dict.fromkeys(FAULTS, 0.02), speculation=0.3, optimism=1),
    Chances(**dict.fromkeys(FAULTS, 0.01), speculation=0.2, loads=0.3, optimism=1),
    Chances(abort=0.1, loads=0.6),
    Chances(rows_lost=0.02, kill=0.01, abort=0.03, loads=0.3, speculation=0.3, weights=0.2),
)


def simulate(num_requests: int) -> dict[str, Any]:
    """Run requests on the simulated engine; a wrong trace is an AssertionError."""
    counts: collections.Counter[str] = collections.Counter()
    happened: collections.Counter[str] = collections.Counter()
    started_s = time.perf_counter()
    for seed in range(-(-num_requests // REQUESTS_A_RUN)):
        chances = SIMULATED[seed % len(SIMULATED)]
        deployment = Deployment(random.Random(seed), REQUESTS_A_RUN, chances)
        deployment.run()
        counts += deployment.check()
        deployment.check_missing(exactly=not chances.given_up)
        happened += deployment.happened
        happened["preemptions"] += deployment.engine.num_preemptions
        happened["loads"] += deployment.engine.num_loads
        happened["weight_changes"] += deployment.weights_version
        happened["rejected_drafts"] += deployment.engine.num_rejected
        happened["requests"] += REQUESTS_A_RUN
    del happened["nothing"]
    zeros = {"complete_and_wrong": 0, "wrong_rows": 0}  # or `check` had failed
    took_s = round(time.perf_counter() - started_s, 1)
    return {**zeros, "took_s": took_s, **dict(sorted((counts + happened).items()))}


def main() -> int:
    """Run what is asked for; return 1 where a trace claims to be complete and is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulated", type=int, default=10_000, metavar="REQUESTS")
    parser.add_argument("--served", type=int, default=1_000, metavar="REQUESTS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "command": " ".join(["python -m benchmarks.faults", *sys.argv[1:]]),
        "versions": versions() | environment.system(),
        "hardware": environment.hardware(),
        "simulated": simulate(args.simulated),
    }
    if args.served:
        from benchmarks.faults.served import run

        result["served"] = run(args.served, args.seed)
    text = json.dumps(result, indent=2)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + "\n")
    parts = [part for part in (result["simulated"], result.get("served")) if part]
    return int(any(part["complete_and_wrong"] or part["wrong_rows"] for part in parts))


if __name__ == "__main__":
    sys.exit(main())
