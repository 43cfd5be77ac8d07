"""Shows that routes of one engine over two nodes are whole, and what a broken link costs.

Two servers of one host are the nodes. The second one's workers reach the collector through a proxy,
which cuts their link while requests run. What must be so:

* Before, and again afterwards, every request's routes are whole.
* Every request is answered, whether the link is cut or not.
* What the cut costs is missing, with the cause ``link_broken`` and no other.
* No id of a request passed the proxy in clear.

It exits with 1 where one of these does not hold::

    python -m benchmarks.gpu.nodes --model DIRECTORY --out runs/nodes.json --device cuda \
        --layout pp2 --layout dp2 --layout external -- --max-num-seqs 64
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import result
from benchmarks.faults.tcp_proxy import TcpProxy
from moescope.servers import (
    Server,
    captured_command,
    end_servers_on_signals,
    free_ports,
    wait_ready,
)

LAYOUTS = ("pp2", "dp2", "external")
"""Pipeline stages; data-parallel engines with API servers on the first node; with their own."""
AWAY_S = 5.0
MAX_TOKENS = 64
NUM_REQUESTS = 8
TIMEOUT_S = 300.0
RECOVERY_S = 30.0
_CONCURRENCY = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Nodes:
    """Two nodes that run."""

    urls: list[str]
    """Of the API servers."""
    proxy: TcpProxy


@dataclasses.dataclass(frozen=True, slots=True)
class Flags:
    """The flags of the two nodes."""

    first: list[str]
    second: list[str]

    @classmethod
    def of(cls, layout: str, port: int) -> Flags:
        """Return those of a layout.

        Args:
            layout: One of `LAYOUTS`.
            port: A free one, for vLLM's own traffic between the nodes.
        """
        if layout == "pp2":
            common = ["--pipeline-parallel-size", "2", "--nnodes", "2"]
            common += ["--master-addr", "127.0.0.1", "--master-port", str(port), "--node-rank"]
            return cls([*common, "0"], [*common, "1", "--headless"])
        common = ["--data-parallel-size", "2", "--data-parallel-address", "127.0.0.1"]
        common += ["--data-parallel-rpc-port", str(port), "--enable-expert-parallel"]
        if layout == "external":
            return cls(
                [*common, "--data-parallel-rank", "0"], [*common, "--data-parallel-rank", "1"]
            )
        common += ["--data-parallel-size-local", "1"]
        return cls(common, [*common, "--data-parallel-start-rank", "1", "--headless"])


@contextlib.contextmanager
def serve_nodes(
    model: str, layout: str, flags: Sequence[str], directory: Path, *, gpus: bool
) -> Iterator[Nodes]:
    """Start both nodes; end them afterwards.

    Args:
        model: Of both.
        layout: One of `LAYOUTS`.
        flags: Further ones, of both.
        directory: Where logs and the key are written.
        gpus: Whether each node has a GPU of its own.
    """
    http, http_2, bind, port = free_ports(4)
    key = directory / "key"
    both = Flags.of(layout, port)
    with TcpProxy(("127.0.0.1", bind), is_recording=True) as proxy, contextlib.ExitStack() as stack:
        servers = []
        for number, (own, where, listens) in enumerate(
            ((both.first, bind, http), (both.second, proxy.port, http_2))
        ):
            args = [model, *own, "--routes-bind", f"127.0.0.1:{where}", "--routes-key-file"]
            args += [str(key), "--port", str(listens), *flags]
            env = {**os.environ, "VLLM_HOST_IP": "127.0.0.1"}
            if gpus:
                env["CUDA_VISIBLE_DEVICES"] = str(number)
            else:  # vLLM takes all cores otherwise: threads of both would wait for each other
                cores = sorted(os.sched_getaffinity(0))
                env["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[number % len(cores)])
            log = directory / f"{layout}-node-{number}.log"
            url = f"http://127.0.0.1:{listens}"
            servers.append(
                stack.enter_context(Server(f"node {number}", captured_command(args), url, log, env))
            )
            _wait_for(key)
        answering = servers if layout == "external" else servers[:1]
        wait_ready(answering, TIMEOUT_S)
        yield Nodes([server.url for server in answering], proxy)


def _wait_for(path: Path) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not path.exists():
        if time.monotonic() > end_s:
            sys.exit(f"the first node wrote no {path}: see its log")
        time.sleep(0.1)


class _Answered(NamedTuple):
    url: str
    request_id: str
    answer_s: float


class Load:
    """Sends requests to all API servers in turn, and fetches their routes.

    Args:
        nodes: Where to.
        model: The model's name there.
    """

    def __init__(self, nodes: Nodes, model: str) -> None:
        self._nodes, self._model = nodes, model
        self._lock = threading.Lock()
        self._number = 0
        self.ids: list[str] = []
        """Of the answers so far."""

    def send(self, count: int) -> list[dict[str, Any]]:
        """Send so many requests, a few at a time; return what their routes are like."""
        with ThreadPoolExecutor(_CONCURRENCY) as threads:
            return list(threads.map(lambda _: self._one(), range(count)))

    def send_for(self, seconds: float) -> list[dict[str, Any]]:
        """Send requests as long as that; return what their routes are like."""
        end_s = time.monotonic() + seconds

        def send() -> list[_Answered]:
            sent = []
            while time.monotonic() < end_s:
                sent.append(self._complete())
            return sent

        with ThreadPoolExecutor(_CONCURRENCY) as threads:
            sent = [one for some in [threads.submit(send) for _ in range(_CONCURRENCY)]
                    for one in some.result()]  # fmt: skip
        return [self._routes(one) for one in sent]

    def _one(self) -> dict[str, Any]:
        return self._routes(self._complete())

    def _complete(self) -> _Answered:
        with self._lock:
            self._number += 1
            number = self._number
        url = self._nodes.urls[number % len(self._nodes.urls)]
        body = {
            "model": self._model, "prompt": f"Tom has {number} apples.", "max_tokens": MAX_TOKENS,
            "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        began_s = time.monotonic()
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
        request_id: str = answer.raise_for_status().json()["id"]
        self.ids.append(request_id)
        return _Answered(url, request_id, time.monotonic() - began_s)

    @staticmethod
    def _routes(answered: _Answered) -> dict[str, Any]:
        began_s = time.monotonic()
        url = f"{answered.url}/routes/{answered.request_id}?wait_s={RECOVERY_S}"
        (trace,) = httpx.get(url, timeout=TIMEOUT_S).raise_for_status().json()["traces"]
        return {
            "complete": trace["complete"],
            "missing": trace["source"].count("missing"),
            "answer_s": answered.answer_s,
            "routes_s": time.monotonic() - began_s,
        }


def causes(url: str) -> dict[str, float]:
    """Return missing rows by cause."""
    text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).raise_for_status().text
    return {
        sample.labels["cause"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "moescope_trace_rows_missing_total" and sample.value
    }


def measure(nodes: Nodes, model: str, away_s: float = AWAY_S) -> dict[str, Any]:
    """Cut the link while requests run; return what was seen, with ``problems``.

    Args:
        nodes: That run.
        model: Its name there.
        away_s: How long the link is cut, in seconds.
    """
    load = Load(nodes, model)
    before = load.send(NUM_REQUESTS)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(load.send_for, away_s + 2)
        nodes.proxy.cut()
        time.sleep(away_s)
        nodes.proxy.mend()
        meanwhile = running.result()
    after = load.send(NUM_REQUESTS)
    recorded = nodes.proxy.recorded
    seen = {
        "away_s": away_s,
        "recorded_bytes": len(recorded),
        "ids_in_clear": sum(one.encode() in recorded for one in load.ids),
        "missing_by_cause": causes(nodes.urls[0]),
        **{name: _summary(some) for name, some in
           (("before", before), ("meanwhile", meanwhile), ("after", after))},
    }  # fmt: skip
    return {**seen, "problems": problems(seen)}


def _summary(answers: list[dict[str, Any]]) -> dict[str, float]:
    num_complete = sum(one["complete"] for one in answers)
    return {
        "complete": num_complete,
        "incomplete": len(answers) - num_complete,
        "rows_missing": sum(one["missing"] for one in answers),
        "slowest_answer_s": round(max(one["answer_s"] for one in answers), 2),
        "slowest_routes_s": round(max(one["routes_s"] for one in answers), 2),
    }


def problems(seen: dict[str, Any]) -> list[str]:
    """Return what must not be."""
    found = [
        f"{seen[when]['incomplete']} requests {when} lack rows"
        for when in ("before", "after")
        if seen[when]["incomplete"]
    ]
    if seen["missing_by_cause"].keys() - {"link_broken"}:
        found.append(f"rows are missing for other causes: {seen['missing_by_cause']}")
    if not seen["missing_by_cause"].get("link_broken"):
        found.append("the cut cost no row: it was none")
    if seen["ids_in_clear"] or not seen["recorded_bytes"]:
        found.append(f"{seen['ids_in_clear']} ids of requests passed the proxy in clear")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the layouts; return 1 where something must not be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", required=True, help="The model's directory or name.")
    parser.add_argument("--out", type=Path, required=True, help="The result file.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="All by default.")
    parser.add_argument("flags", nargs="*", help="Further flags of both servers, after --.")
    args = parser.parse_args(argv)
    end_servers_on_signals()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for layout in args.layout or LAYOUTS:
        directory = Path(tempfile.mkdtemp(prefix=f"nodes-{layout}-", dir=args.out.parent))
        with serve_nodes(
            args.model, layout, args.flags, directory, gpus=args.device == "cuda"
        ) as nodes:
            found[layout] = measure(nodes, args.model)
        print(layout, json.dumps(found[layout]), flush=True)
        result.write(args.out, "benchmarks.gpu.nodes", layouts=found)
    return int(any(one["problems"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
