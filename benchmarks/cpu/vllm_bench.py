"""``moescope bench`` beside vLLM's own benchmark: ``python -m benchmarks.cpu.vllm_bench``.

Both clients put the same load on the same server, in rounds of shuffled order: vLLM's, vLLM's
again and ours. The first two differ by the noise of the run. vLLM's is its own code, called in
this process, since its command line needs a distribution that the CPU build lacks. The model is
one whose steps take long (`benchmarks.cpu.model`): with short ones 2 cores are too few for a
server and a client, and vLLM's own figures move by tens of percent.

In chats vLLM's client takes the chunk that names the role for the first token; ours takes the one
after it, which a vLLM server sends a moment later.

Source: vLLM 0.32.0, ``vllm/benchmarks/serve.py``, ``benchmark``.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vllm.benchmarks import serve
from vllm.benchmarks.datasets import SampleRequest
from vllm.tokenizers import get_tokenizer

from benchmarks import result
from benchmarks.cpu import model
from moescope import datasets, servers
from moescope.bench import latency, schedule, workload
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.workload import PATHS, Conversation, Endpoint, RequestOptions
from moescope.overhead.arms import STOCK, Arm, Model
from moescope.overhead.comparison import bootstrap_interval
from moescope.overhead.hosting import Launcher
from moescope.run_dir import RunDir
from moescope.servers import end_servers_on_signals
from moescope.service import DEMO_MODEL

ARMS = ("vllm", "vllm-again", "moescope")
METRICS = ("median_ttft_ms", "median_tpot_ms", "output_throughput")
LIMIT_PERCENT = 3.0
NOISY_PERCENT = 10.0
"""Where vLLM's own figures move by more, nothing is shown."""
FLAGS = ("--load-format", "dummy", "--enforce-eager", "--max-model-len", "1024")


class Load:
    """What both clients ask in a round: the same bodies, at the same times.

    Args:
        endpoint: Where to.
        conversations: One turn each.
        concurrency: The closed loop's; None: an open loop.
        rate: The open loop's requests a second.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        conversations: Sequence[Conversation],
        concurrency: int | None = None,
        rate: float = math.inf,
    ) -> None:
        self.endpoint, self.conversations = endpoint, conversations
        self.concurrency, self.rate = concurrency, rate

    def ours(self, url: str, salt: str) -> dict[str, float]:
        """Put it on a server with moescope's client."""
        extra = {"cache_salt": salt}
        options = RequestOptions(
            model=DEMO_MODEL, endpoint=self.endpoint, ignore_eos=True, extra_body=extra
        )
        due_s = None
        if self.concurrency is None:
            num = len(self.conversations)
            due_s = schedule.due_times(num, request_rate=self.rate, burstiness=math.inf).tolist()
        pace = Pace(max_concurrency=self.concurrency, due_s=due_s)
        run = Run(self.conversations, options, Target(base_url=url), pace)
        asyncio.run(run.go())
        summary = latency.summarize(run.requests, run.duration_s)
        require_all(summary.completed, len(self.conversations))
        return {
            "median_ttft_ms": summary.latencies["ttft"].median_ms,
            "median_tpot_ms": summary.latencies["tpot"].median_ms,
            "output_throughput": summary.output_throughput,
            "total_output_tokens": summary.total_output_tokens,
        }

    def vllms(self, url: str, salt: str, tokenizer: object) -> dict[str, float]:
        """Put it on a server with vLLM's client."""
        requests = [
            SampleRequest(
                prompt=turn.content,
                prompt_len=len(turn.content),
                expected_output_len=turn.max_tokens,
            )
            for (turn,) in self.conversations
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            result = asyncio.run(
                serve.benchmark(
                    task_type=serve.TaskType.GENERATION,
                    endpoint_type="openai-chat" if self.endpoint == "chat" else "openai",
                    api_url=url + PATHS[self.endpoint],
                    base_url=url,
                    model_id=DEMO_MODEL,
                    model_name=DEMO_MODEL,
                    tokenizer=tokenizer,
                    input_requests=requests,
                    logprobs=None,
                    request_rate=self.rate,
                    burstiness=math.inf,
                    disable_tqdm=True,
                    num_warmups=0,
                    profile=False,
                    selected_percentile_metrics=["ttft", "tpot"],
                    selected_percentiles=[99.0],
                    ignore_eos=True,
                    goodput_config_dict={},
                    max_concurrency=self.concurrency,
                    lora_modules=None,
                    extra_headers=None,
                    extra_body={"temperature": 0.0, "cache_salt": salt},
                    ready_check_timeout_sec=0,
                )
            )
        require_all(result["completed"], len(self.conversations))
        return {name: float(result[name]) for name in (*METRICS, "total_output_tokens")}


def require_all(completed: int, wanted: int) -> None:
    """Check that no request failed."""
    if completed != wanted:
        raise RuntimeError(f"{completed} of {wanted} requests were answered")


def loads(num: int) -> dict[str, Load]:
    """Return the loads by name."""
    texts = [one.question for one in datasets.sample()]
    chats = workload.from_texts(texts, num_conversations=num, turns=1, max_tokens=16)
    tokens = workload.random_tokens(num_conversations=num, turns=1, input_len=128, output_len=16)
    return {
        "closed loop of 4, completions, 128 random tokens in, 16 out": Load(
            "completions", tokens, concurrency=4
        ),
        "open loop at 1.5 a second, completions, 128 random tokens in, 16 out": Load(
            "completions", tokens, rate=1.5
        ),
        "closed loop of 4, chat, sample, 16 out": Load("chat", chats, concurrency=4),
    }


def compare(load: Load, url: str, tokenizer: object, num_rounds: int) -> dict[str, Any]:
    """Run all rounds of a load; return every figure and the paired differences."""
    clients: dict[str, Callable[[str], dict[str, float]]] = {
        "vllm": lambda salt: load.vllms(url, salt, tokenizer),
        "vllm-again": lambda salt: load.vllms(url, salt, tokenizer),
        "moescope": lambda salt: load.ours(url, salt),
    }
    order, rounds = random.Random(0), []
    for number in range(num_rounds + 1):
        names = list(ARMS)
        order.shuffle(names)
        # A salt a pass: no pass finds another's prefix in the cache.
        rounds.append({name: clients[name](f"{id(load)}-{number}-{name}") for name in names})
    counted = rounds[1:]  # the first is the warm-up
    return {
        "rounds": counted,
        "medians": {
            name: {metric: float(np.median([item[name][metric] for item in counted]))
                   for metric in METRICS} for name in ARMS
        },
        "paired": {metric: verdict(counted, metric) for metric in METRICS},
    }  # fmt: skip


def verdict(rounds: Sequence[dict[str, dict[str, float]]], metric: str) -> dict[str, Any]:
    """Return the paired differences in a metric, in percent of vLLM's, and what they show."""

    def percents(name: str) -> list[float]:
        return [100.0 * (item[name][metric] / item["vllm"][metric] - 1.0) for item in rounds]

    ours, again = percents("moescope"), percents("vllm-again")
    spread = max(map(abs, bootstrap_interval(again, 0)))
    median = float(np.median(ours))
    limit = max(LIMIT_PERCENT, spread)
    said = "agrees" if abs(median) <= limit else "differs"
    return {
        "median_difference_percent": median,
        "interval_95_of_mean_percent": bootstrap_interval(ours, 0),
        "vllm_again_median_difference_percent": float(np.median(again)),
        "vllm_again_spread_percent": spread,
        "limit_percent": limit,
        "verdict": said if spread <= NOISY_PERCENT else "too noisy to say",
    }


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--num-prompts", type=int, default=12)
    args = parser.parse_args()
    end_servers_on_signals()
    path = str(args.out.parent / "model")
    model.write(Path(path))
    launcher = Launcher(
        model=Model(path=path, served_name=DEMO_MODEL, args=FLAGS),
        run_dir=RunDir(args.out.parent),
        timeout_s=600.0,
        tell=print,
        env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ},
    )
    tokenizer = get_tokenizer(path)
    with launcher.server(Arm(name=STOCK)) as server:
        servers.wait_ready((server,), launcher.timeout_s)
        results = {
            name: compare(load, server.url, tokenizer, args.rounds)
            for name, load in loads(args.num_prompts).items()
        }
    server.log.unlink()
    result.write(
        args.out, "benchmarks.cpu.vllm_bench", requests_a_pass=args.num_prompts, loads=results
    )
    for name, one in results.items():
        print(name)
        for metric, said in one["paired"].items():
            print(
                f"  {metric}: moescope {said['median_difference_percent']:+.2f}%, vLLM again "
                f"{said['vllm_again_median_difference_percent']:+.2f}% (limit "
                f"{said['limit_percent']:.2f}%): {said['verdict']}"
            )


if __name__ == "__main__":
    main()
