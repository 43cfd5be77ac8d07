"""A real vLLM server with the bundled model in float32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moescope.servers import Server, free_ports, wait_ready

START_TIMEOUT_S = 300.0
API_KEY = "e2e-key"
MODEL = "bundled"
"""The name under which the model is served."""

# Small steps and blocks: prompts are cut into chunks, and prefixes are shared.
FLAGS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "1024"),
    *("--max-num-batched-tokens", "128", "--max-num-seqs", "8", "--block-size", "32"),
    *("--api-key", API_KEY, "--host", "127.0.0.1"),
)
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}


def made(
    command: Sequence[str], env: Mapping[str, str], log: Path, flags: Sequence[str] = ()
) -> Server:
    """Return a server that is not started yet.

    Args:
        command: What starts it, with its model; `FLAGS` and a port are added.
        env: Variables beside those of this process and `ENV`.
        log: Where its output goes; the server has its name.
        flags: Of vLLM; they win over `FLAGS`.
    """
    (port,) = free_ports(1)
    return Server(
        log.stem,
        [*command, *FLAGS, *flags, "--port", str(port)],
        f"http://127.0.0.1:{port}",
        log,
        {**os.environ, **ENV, **env},
    )


@contextlib.contextmanager
def serving(
    command: Sequence[str], env: Mapping[str, str], log: Path, flags: Sequence[str] = ()
) -> Iterator[Server]:
    """Start a server and wait until it is ready; end it afterwards.

    Args:
        command: As of `made`, like all others.
        env: See there.
        log: See there.
        flags: See there.
    """
    with made(command, env, log, flags) as server:
        wait_ready([server], START_TIMEOUT_S)
        yield server
