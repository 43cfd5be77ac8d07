"""What a scrape of a big model costs: ``python -m benchmarks.cpu.scrape --out result.json``.

Answers ``/metrics`` for 58 layers of 256 experts in two phases, with every expert shown and with
the defaults, beside vLLM's own exposition alone in the same format, in one process and in shuffled
order; and watches how long the event loop stands still meanwhile. The collector answers in the
same process, so that its part counts as well; what the socket between them takes does not.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.concurrency import run_in_threadpool
from vllm.utils.gc_utils import freeze_gc_heap

from benchmarks import result
from moescope_service import bundled_model
from moescope_service.api import metrics
from moescope_service.collector.core import Collector
from moescope_service.messages import CaptureSpec, pack_introduction, unpack
from moescope_service.queries import MetricsQuery, MetricsReply, pack_query, unpack_reply
from moescope_service.settings import Settings

LAYERS, EXPERTS = 58, 256
BEAT_S = 0.002
FORMATS = {"text": "text/plain", "openmetrics": openmetrics.CONTENT_TYPE_LATEST}
"""Media types; Prometheus asks for OpenMetrics."""


def register_vllm_metrics() -> None:
    """Let vLLM register what an engine shows."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    config = EngineArgs(model=str(bundled_model.path())).create_engine_config()
    PrometheusStatLogger(config, [0])


def vllm_alone(is_open: bool) -> bytes:
    """Return vLLM's own metrics."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    if is_open:
        encode: Callable[..., bytes] = openmetrics.generate_latest
        return encode(get_prometheus_registry(), escaping=openmetrics.ALLOWUTF8)
    return generate_latest(get_prometheus_registry())


def busy_collector() -> Collector:
    """Return the collector of a big model, with traffic in every layer."""
    spec = CaptureSpec(
        engine=0, num_engines=1, stage=0, num_stages=1,
        layers=list(range(3, 3 + LAYERS)), num_hidden_layers=3 + LAYERS,
        num_experts=EXPERTS, top_k=8, id_dtype="uint8", weights_dtype="float16",
        router_types=["GroupedTopKRouter"], block_size=16, num_blocks=8, trust_prefix_hits=True,
        model="big", device="cpu", seed=0, versions={},
    )  # fmt: skip
    collector = Collector(Settings())
    collector.handle(b"worker", pack_introduction(spec))
    counters = collector.state.counters
    if counters is None:
        raise RuntimeError("the collector counts nothing: it did not take the introduction")
    counters.totals += np.random.default_rng(0).integers(0, 10**9, counters.totals.shape)
    counters.rows += (10**7, 10**8)
    return collector


def ask(collector: Collector) -> MetricsReply:
    """Return the collector's answer to a scrape."""
    collector.state.outbox.clear()
    collector.handle(b"api", pack_query(0, MetricsQuery()))
    ((_, frames),) = collector.state.outbox
    reply = unpack_reply(MetricsReply, unpack(frames)[1], [bytes(frame) for frame in frames])
    return cast("MetricsReply", reply)


async def longest_stall(work: Callable[[], Any]) -> tuple[float, float]:
    """Run work in a thread; return its seconds and the loop's longest stall meanwhile."""
    beats, done = [time.perf_counter()], False

    async def beat() -> None:
        while not done:
            await asyncio.sleep(BEAT_S)
            beats.append(time.perf_counter())

    heart = asyncio.create_task(beat())
    started_s = time.perf_counter()
    await run_in_threadpool(work)
    seconds = time.perf_counter() - started_s
    done = True
    await heart
    stall_s = max(b - a for a, b in itertools.pairwise(beats)) - BEAT_S
    return seconds, max(stall_s, 0.0)


def measure(rounds: int, media_type: str) -> dict[str, Any]:
    """Measure all three expositions in one format, in shuffled rounds."""
    collector = busy_collector()

    def render(expert_metrics: str) -> bytes:
        return metrics.render(ask(collector), media_type, expert_metrics)[0]

    works: dict[str, Callable[[], bytes]] = {
        "vllm_alone": lambda: vllm_alone(media_type != "text/plain"),
        "defaults": lambda: render("auto"),
        "every_expert": lambda: render("on"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    stalls: dict[str, list[float]] = {name: [] for name in works}
    order = random.Random(0)
    for number in range(rounds + 1):
        names = list(works)
        order.shuffle(names)
        for name in names:
            took_s, stall_s = asyncio.run(longest_stall(works[name]))
            if number:  # the first round warms up
                seconds[name].append(took_s)
                stalls[name].append(stall_s)
    base = statistics.median(seconds["vllm_alone"])
    return {
        name: summary(work(), seconds[name], stalls[name], base) for name, work in works.items()
    }


def summary(
    body: bytes, seconds: list[float], stalls: list[float], base_s: float
) -> dict[str, Any]:
    """Return what one exposition took, and its ratio to vLLM's alone."""
    median_s = statistics.median(seconds)
    return {
        "bytes": len(body),
        "our_series": sum(line.startswith(b"moescope_") for line in body.splitlines()),
        "median_ms": 1e3 * median_s,
        "quartiles_ms": [1e3 * q for q in statistics.quantiles(seconds)],
        "longest_ms": 1e3 * max(seconds),
        "ratio_to_vllm_alone": median_s / base_s,
        "longest_loop_stall_ms": 1e3 * max(stalls),
    }


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    register_vllm_metrics()
    freeze_gc_heap()  # as vLLM's API server does when it has started
    result.write(
        args.out,
        "benchmarks.cpu.scrape",
        model={"layers": LAYERS, "experts": EXPERTS, "phases": 2},
        **{name: measure(args.rounds, media_type) for name, media_type in FORMATS.items()},
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
