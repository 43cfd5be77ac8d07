"""How many short streams a second one client holds: ``python -m benchmarks.cpu.client_rate``.

The client has one core, the trivial server the others. In the open loop each rate is asked for
during some seconds; the closed loop says where the core is full.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from typing import Any

from benchmarks import result
from moescope import servers
from moescope.bench import latency, schedule
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.workload import RequestOptions, Turn
from moescope.servers import end_servers_on_signals

RATES = (250, 500, 750, 1000)
CONCURRENCY = 32
ASK = RequestOptions(model="trivial", endpoint="completions")


def measure(url: str, pace: Pace, num: int) -> dict[str, Any]:
    """Run one load; return its figures."""
    run = Run([(Turn("word " * 20, 4),)] * num, ASK, Target(base_url=url), pace)
    asyncio.run(run.go())
    summary = latency.summarize(run.requests, run.duration_s, cpu_s=run.cpu_s, percentiles=(99.0,))
    return {
        "requests": num,
        "failed": summary.failed,
        "requests_per_s": summary.request_throughput,
        "client_cpu": summary.client_cpu,
        "lag_ms": dataclasses.asdict(summary.lag),
        "ttft_ms": dataclasses.asdict(summary.latencies["ttft"]),
        "tpot_ms": dataclasses.asdict(summary.latencies["tpot"]),
        "warnings": summary.warnings,
    }


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    end_servers_on_signals()
    cores = os.sched_getaffinity(0)
    first, *others = sorted(cores)
    os.sched_setaffinity(0, others or {first})  # the server inherits it
    (port,) = servers.free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "benchmarks.cpu.trivial_server", str(port)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out.with_suffix(".log")
    with servers.Server("trivial", command, url, log, os.environ) as server:
        servers.wait_ready((server,), 30.0)
        os.sched_setaffinity(0, {first})
        opened = {}
        for rate in RATES:
            num = int(rate * args.seconds)
            due_s = schedule.due_times(num, request_rate=rate, seed=0).tolist()
            opened[str(rate)] = measure(url, Pace(due_s=due_s), num)
        closed = measure(url, Pace(max_concurrency=CONCURRENCY), int(500 * args.seconds))
    log.unlink()
    os.sched_setaffinity(0, cores)  # the result names the machine's
    result.write(
        args.out,
        "benchmarks.cpu.client_rate",
        open_loop_by_requests_per_s=opened,
        **{f"closed_loop_of_{CONCURRENCY}": closed},
    )
    for asked, one in opened.items():
        print(
            f"{asked} requests/s asked: {one['requests_per_s']:.1f} held, core "
            f"{one['client_cpu']:.0%} busy, lag {one['lag_ms']['mean_ms']:.2f} ms mean, "
            f"{one['lag_ms']['p99_ms']:.2f} p99"
        )
    print(f"closed loop of {CONCURRENCY}: {closed['requests_per_s']:.1f} requests/s at most")


if __name__ == "__main__":
    main()
