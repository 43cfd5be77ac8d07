"""The collector of a real server is killed while requests run, and at last its engine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from benchmarks.faults import served
from benchmarks.faults.served import collector_pid, judge, until
from benchmarks.simulation.server import API_KEY, MODEL, serving
from moescope import Client, Source, errors
from moescope.servers import Server, captured_command
from moescope_service import bundled_model
from tests.waiting import scrape, wait_until

from .fidelity import SHARED, compare


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = captured_command([str(bundled_model.path()), "--enforce-eager"])
    command += ["--routes-weights-dtype", "float32"]
    with serving(command, {}, tmp_path_factory.mktemp("restart") / "restart.log") as server:
        yield server


NUM_LONG = 6
"""Long requests at once: together they outlast the pause before the next collector."""


async def kill_amid_streams(server: Server) -> tuple[str, list[str]]:
    """Kill the collector after ten tokens, let the next one come.

    Returns:
        The ids of a request from before, and of those that ran.
    """
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with (
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY) as client,
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as http,
    ):
        before = await client.completions.create(model=MODEL, prompt=SHARED, max_tokens=4)
        long = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
        others = [
            asyncio.create_task(client.completions.create(model=MODEL, prompt=f"Item {n}", **long))
            for n in range(1, NUM_LONG)
        ]
        stream = await client.completions.create(model=MODEL, prompt="One", stream=True, **long)
        number, killed = 0, collector_pid(server)
        assert killed is not None
        async for chunk in stream:
            number, amid = number + 1, chunk.id
            if number == 10:
                os.kill(killed, signal.SIGKILL)
                # The model does not wait for anybody: it goes on meanwhile.
                await asyncio.to_thread(
                    wait_until,
                    lambda: collector_pid(server) not in {None, killed},
                    "another one is started",
                )
                await until(200, http, "GET", "/moescope/info")
        return before.id, [amid, *(one.id for one in await asyncio.gather(*others))]


def test_a_kill_under_load(server: Server) -> None:
    before, running = asyncio.run(kill_amid_streams(server))
    with Client(server.url, api_key=API_KEY) as client:
        with pytest.raises(errors.RequestNotFoundError):
            client.routes(before)
        for request_id in running:
            (trace,) = client.routes(request_id, wait_s=10)
            missing = trace.source == Source.MISSING
            first = int(missing.argmin())
            assert 0 < first < trace.num_rows == trace.num_tokens - 1
            assert missing[:first].all()
            assert not missing[first:].any(), "later rows are there"
            assert not trace.complete
            assert judge([trace])["wrong_rows"] == 0
            print(f"{first} of {trace.num_rows} rows were routed before the collector was back")
        metrics = scrape(server.url)
        assert 'moescope_collector_restarts_total{model_name="bundled"} 1.0' in metrics
        assert 'moescope_step_gaps_total{model_name="bundled"} 0.0' in metrics

        # The prefix cache still holds the blocks that the first request filled.
        (trace,) = client.routes(asyncio.run(complete(server, SHARED)), wait_s=10)
        assert trace.cached_len > 0
        assert (trace.source[: trace.cached_len] == Source.MISSING).all()
        assert (trace.source[trace.cached_len :] == Source.COMPUTED).all()

        for _ in range(2):  # the second one hits what the first one filled
            (trace,) = client.routes(asyncio.run(complete(server, "Later. " + SHARED)), wait_s=10)
            assert trace.complete
            compare(trace)
        assert trace.cached_len > 0


async def complete(server: Server, prompt: str) -> str:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY) as client:
        return (await client.completions.create(model=MODEL, prompt=prompt, max_tokens=4)).id


def test_faults_in_the_transport() -> None:
    """The short form of ``python -m benchmarks.faults``.

    Most requests come after the collector is back, and find prefixes of before it was killed.
    """
    found = served.run(200, seed=1, kill_every=80)
    print(found)
    assert found["complete_and_wrong"] == found["wrong_rows"] == 0
    assert found["requests"] == 200
    assert min(found[name] for name in ("complete", "computed", "cached", "missing")) > 0
    assert found["collector_kills"] > 0


def test_an_engine_that_dies_is_answered_as_stock_answers(server: Server) -> None:
    """Stock vLLM 0.32.0: 500, an error as the last event of a stream, and the exit code 0.

    Measured with the same kill; the server does not outlive this test.
    """
    core = engine_pid(server)

    def ask(stream: bool) -> tuple[int, str]:
        body = {"model": MODEL, "prompt": "Tom has", "max_tokens": 900, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {API_KEY}"}
        url = f"{server.url}/v1/completions"
        with httpx.stream(
            "POST", url, json=body | {"stream": stream}, headers=headers, timeout=60
        ) as answer:
            if stream:
                started.set()
            return answer.status_code, answer.read().decode()

    started = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        whole, streamed = (pool.submit(ask, stream) for stream in (False, True))
        assert started.wait(60)
        os.kill(core, signal.SIGKILL)
        for answer, expected in ((whole, 500), (streamed, 200)):
            status_code, body = answer.result(60)
            assert status_code == expected
            assert "InternalServerError" in body
    server.wait_exit(30)
    with pytest.raises(errors.CommandError, match="ended with status 0 "):
        server.is_ready()


def engine_pid(server: Server) -> int:
    """Return the process id of a server's engine core."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = path.read_text().rsplit(")", 1)[1].split()[1]
            command = path.with_name("cmdline").read_bytes()
            if int(parent) == server.pid and b"EngineCore" in command:
                return int(path.parent.name)
    raise AssertionError("the server has no engine")
