"""A deployment without a model: the real app, collector process, recorder and output processor.

What is fake is the engine: `Engine` says what was scheduled and which rows came of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from benchmarks.simulation.app import make_app, server_args
from moescope_service.runtime import collector_address
from moescope_service.settings import ENABLE, RUNTIME_DIR
from tests.waiting import DEADLINE_S, wait_until

from .fake_engine import OUTPUT, PROMPT, SPEC, Engine, Running, rows_of


class Frontend:
    """What `AsyncLLM` is to the plugin, with vLLM's own output processor."""

    def __init__(self, engine: Engine, tokenizer: Any = None) -> None:
        self.engine = engine
        self.output_processor = OutputProcessor(tokenizer, log_stats=False)
        self._number = 0
        self.lora: LoRARequest | None = None
        """The adapter of the requests to come."""

    def add(self, external_id: str, n: int = 1, prompt: Any = PROMPT, **params: Any) -> list[str]:
        """Add a request's sequences as `AsyncLLM.add_request` does; returns the internal ids."""
        sampling = SamplingParams(n=n, max_tokens=8, detokenize=False, **params)
        self._number += 1
        base = f"{external_id}-{self._number:08x}"
        parent, names, arrival_s = None, [base], time.time()
        if n > 1:
            parent = ParentRequest(self._request(base, external_id, prompt, sampling, arrival_s))
            names = [parent.get_child_info(index)[0] for index in range(n)]
            sampling = SamplingParams(n=1, max_tokens=8, detokenize=False, **params)
        for index, name in enumerate(names):
            request = self._request(name, external_id, prompt, sampling, arrival_s)
            self.output_processor.add_request(request, None, parent, index, None)
        return names

    def _request(
        self, name: str, external_id: str, prompt: Any, params: Any, arrival_s: float
    ) -> EngineCoreRequest:
        return EngineCoreRequest(name, list(prompt), None, params, None, arrival_s, self.lora, None,
                                 None, external_req_id=external_id)  # fmt: skip

    def put(self, name: str, tokens: list[int], reason: FinishReason | None) -> None:
        """Hand over what the engine sampled."""
        self.output_processor.process_outputs(
            [EngineCoreOutput(name, tokens, finish_reason=reason)]
        )

    def serve(self, external_id: str, n: int = 1, **params: Any) -> list[Running]:
        """Run a request to its last token; the ends come with the engine's next step."""
        sequences = [self.engine.start(name) for name in self.add(external_id, n, **params)]
        for number, token in enumerate(OUTPUT):
            if number:
                self.engine.step([(running, 1) for running in sequences])
            last = number == len(OUTPUT) - 1
            for running in sequences:
                self.put(running.internal_id, [token], FinishReason.STOP if last else None)
        return sequences


class Deployment:
    """The collector's process, a worker's recorder, and a server at `url`."""

    def __init__(self, **flags: Any) -> None:
        self.args = server_args(flags.pop("api_key", None), flags.pop("allowed_origins", None))
        self.spec = flags.pop("spec", SPEC)
        self.tokenizer = flags.pop("tokenizer", None)
        self.worker_address = flags.pop("worker_address", None)
        self.rows_of = flags.pop("rows_of", rows_of)
        self.env = {f"MOESCOPE_ROUTES_{name.upper()}": value for name, value in flags.items()}
        self.directory = Path(tempfile.mkdtemp(prefix="moescope-test-"))

    @contextlib.contextmanager
    def running(self) -> Iterator[Deployment]:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            env = {ENABLE: "1", RUNTIME_DIR: str(self.directory), "VLLM_PLUGINS": "moescope"}
            for name, value in {**self.env, **env}.items():
                patch.setenv(name, value)
            self.start_processes(stack)
            self.engine = Engine(
                self.worker_address or collector_address(), self.spec, rows_of=self.rows_of
            )
            stack.callback(self.engine.recorder.close)
            self.frontend = Frontend(self.engine, self.tokenizer)
            self.app = self.make_app()
            self.url = stack.enter_context(serving(self.app))
            self.http = stack.enter_context(httpx.Client(base_url=self.url, timeout=DEADLINE_S))
            yield self

    def start_processes(self, stack: contextlib.ExitStack) -> None:
        """Start what runs beside the server, and let the stack end it."""
        self.collector = start_collector(collector_address())
        stack.callback(lambda: stop_collector(self.collector))

    def make_app(self) -> FastAPI:
        processor = self.frontend.output_processor
        return make_app(self.args, processor, completions=self.completions)

    async def completions(self, request: Request) -> Any:
        """Answer as vLLM's endpoint does: the id is chosen here, the engine's has a suffix."""
        body = await request.json()
        response_id = "cmpl-" + request.headers.get("X-Request-Id", body.get("id", "x"))
        request.state.request_metadata = SimpleNamespace(request_id=response_id)
        loop = asyncio.get_running_loop()

        def generate() -> None:
            for number in range(body.get("prompts", 1)):
                params = {"extra_args": body["xargs"]} if "xargs" in body else {}
                ended = self.frontend.serve(f"{response_id}-{number}", body.get("n", 1), **params)
                loop.call_later(0.02, lambda e=ended: self.engine.step(finished=e))

        async def stream() -> AsyncIterator[bytes]:
            generate()
            yield b"data: [DONE]\n\n"

        if body.get("stream"):
            return StreamingResponse(stream())
        generate()
        return JSONResponse({"id": response_id})

    def complete(self, request_id: str, headers: Any = None, **body: Any) -> httpx.Response:
        headers = {"Authorization": "Bearer secret", **(headers or {})}
        answer = self.http.post("/v1/completions", json={"id": request_id, **body}, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer

    def kill_collector(self) -> None:
        self.collector.send_signal(signal.SIGKILL)
        self.collector.wait(DEADLINE_S)


def start_collector(address: str, epoch: int = 0, **env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "moescope_service.collector", address, str(os.getpid()),
         str(epoch)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def stop_collector(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(DEADLINE_S)
    assert process.stdout is not None
    process.stdout.close()


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app from a thread, on a port that is free."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    app.state.server = server  # as vLLM does
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server starts")
        assert server.started, "the app did not start; its log says why"
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
