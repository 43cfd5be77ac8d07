"""The app without a model: ``python -m benchmarks.cpu.routes_server PORT``.

Beside our endpoints it has ``/bytes/{number}``, which answers with so many bytes at once: what a
body of that size costs by itself.
"""

from __future__ import annotations

import sys

import uvicorn
from fastapi import Response
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.output_processor import OutputProcessor

from benchmarks.simulation.app import make_app, server_args


class Healthy:
    """The engine, as ``/health`` sees it."""

    async def check_health(self) -> None:
        """Find nothing wrong."""


def main() -> None:
    """Serve."""
    app = make_app(server_args(), OutputProcessor(None, log_stats=False))
    app.state.engine_client = Healthy()

    @app.get("/bytes/{number}")
    async def of_bytes(number: int) -> Response:
        return Response(bytes(number), media_type="application/octet-stream")

    freeze_gc_heap()  # as vLLM's API server does when it has started
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")


if __name__ == "__main__":
    main()
