"""Each example runs as it stands against a real server, and prints what the server has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from moescope import Client, RouteTrace, arrow
from moescope.servers import Server
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TIMEOUT_S = 400
Run = Callable[..., str]


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


@pytest.fixture
def run(server: Server, tmp_path: Path) -> Run:
    """Return a function that runs an example in an empty directory and returns its output."""

    def run(name: str, *args: str) -> str:
        env = {**os.environ, "MOESCOPE_URL": server.url, "VLLM_CPU_KVCACHE_SPACE": "1"}
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *args],
            cwd=tmp_path, env=env, check=False, capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        # pyarrow's threads may abort a process that is ending (Arrow issue 34314).
        ended = done.returncode == 0 or "pyarrow" in (EXAMPLES / name).read_text()
        assert ended, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    return run


def newest(client: Client, requests: int) -> list[list[RouteTrace]]:
    """Return the traces of the requests that ended last, newest request first."""
    ids = list(dict.fromkeys(one.request_id for one in client.recent(limit=500).sequences))
    return [client.routes(request_id) for request_id in ids[:requests]]


def numbers(line: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", line)]


def test_every_example_is_tested_and_described() -> None:
    tested = Path(__file__).read_text()
    described = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in tested, path.name
        assert f"({path.name})" in described, path.name


def test_one_request(run: Run, client: Client) -> None:
    answer, tokens, shape, _, *layers = run("one_request.py").strip().rsplit("\n", 9)
    ((trace,),) = newest(client, 1)
    assert trace.complete
    assert answer
    assert numbers(tokens) == [trace.num_tokens, trace.prompt_len]
    assert tokens.endswith("complete: True")
    assert numbers(shape) == [trace.num_layers, trace.top_k, trace.num_experts]
    assert len(layers) == trace.num_layers
    for line, layer, ids, weights in zip(
        layers, trace.layers, trace.topk_ids[-1], trace.topk_weights[-1], strict=True
    ):
        assert line.startswith(f"  layer {layer}: ")
        printed = re.findall(r"expert (\d+) \((.*?)\)", line)
        assert printed == sorted(printed, key=lambda pair: pair[1], reverse=True)
        assert dict(printed) == {
            f"{expert}": f"{weight:.3f}" for expert, weight in zip(ids, weights, strict=True)
        }


def test_routes_to_parquet(run: Run, client: Client, tmp_path: Path) -> None:
    first, _, *best = run("routes_to_parquet.py", "24").splitlines()
    traces = [trace for found in newest(client, 24) for trace in found]
    rows = sum(trace.num_rows for trace in traces)
    assert numbers(first)[:2] == [24, rows]
    assert first.endswith("failed: {}")
    stored = arrow.from_table(parquet.read_table(tmp_path / "routes.parquet"))
    by_id = {trace.request_id: trace for trace in traces}
    assert by_id.keys() == {trace.request_id for trace in stored}
    for trace in stored:
        np.testing.assert_array_equal(trace.topk_ids, by_id[trace.request_id].topk_ids)
    prompts, outputs = Counter[int](), Counter[int]()
    for trace in traces:
        prompts.update(trace.topk_ids[: trace.prompt_len, 0].ravel().tolist())
        outputs.update(trace.topk_ids[trace.prompt_len :, 0].ravel().tolist())
    most = sorted((prompts + outputs).items(), key=lambda item: (-item[1], item[0]))[:5]
    wanted = [[expert, prompts[expert], outputs[expert]] for expert, _ in most]
    assert [numbers(line) for line in best] == wanted


def test_coactivation(run: Run, client: Client) -> None:
    first, *pairs = run("coactivation.py").splitlines()
    (traces,) = newest(client, 1)
    assert len(traces) == 20
    layer, rows = numbers(first)
    ids = np.concatenate([trace.topk_ids[:, list(trace.layers).index(layer)] for trace in traces])
    assert rows == len(ids)
    together = Counter[tuple[int, int]]()
    alone = Counter(ids.ravel().tolist())
    for row in ids.tolist():
        together.update((a, b) for a in row for b in row if a < b)
    assert [count for _, count in together.most_common(5)] == [numbers(line)[2] for line in pairs]
    for line in pairs:
        a, b, count, *_ = numbers(line)
        assert together[a, b] == count
        assert f"{alone[a] * alone[b] / rows:.1f} by chance" in line


def test_training_batch(run: Run, client: Client) -> None:
    samples, tokens, missing = run("training_batch.py").splitlines()
    traces = [trace for found in newest(client, 6) for trace in found]
    assert numbers(samples) == [24, 24, 24]
    assert numbers(tokens) == [sum(trace.num_tokens - trace.prompt_len for trace in traces)]
    rows = sum(trace.num_rows for trace in traces)
    assert missing == f"0 of {rows:,} rows are missing; requests without routes: {{}}"


def test_training_batch_tells_what_is_missing(run: Run, client: Client) -> None:
    client.pause()
    try:
        wait_until(lambda: client.info().capture == "paused", "the capture pauses")
        samples, _, missing = run("training_batch.py").splitlines()
    finally:
        client.resume()
    traces = [trace for found in newest(client, 6) for trace in found]
    lost = sum(int((~trace.present).sum()) for trace in traces)
    assert lost > 0
    assert numbers(samples) == [24, 24, sum(bool(trace.present.all()) for trace in traces)]
    assert numbers(missing)[:2] == [lost, sum(trace.num_rows for trace in traces)]


def test_rollouts(run: Run, client: Client) -> None:
    options = ["--steps", "2", "--prompts", "4", "--samples", "2", "--turns", "3"]
    _, *steps = run("rollouts.py", *options).splitlines()
    last = [trace for found in newest(client, 2 * (4 + 8 + 8)) for trace in found][::-1]
    for number, line in enumerate(steps):
        traces = last[number * 24 :][16:24]  # those of the last turn
        rows = sum(trace.num_rows for trace in traces)
        assert numbers(line)[:4] == [number, 8, rows + len(traces), rows]
        assert line.endswith(f"{{0: {rows}}}  -")
    assert len(steps) == 2


def test_offline_llm(run: Run) -> None:
    lines = [line for line in run("offline_llm.py").splitlines() if line.startswith("request ")]
    assert len(lines) == 4
    for line in lines:
        _, _, prompt, output, rows, layers, top_k = numbers(line)
        assert (rows, layers, top_k) == (prompt + output - 1, 6, 4)
        assert line.endswith("complete: True")
