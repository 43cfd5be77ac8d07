"""vLLM's app with our plugin and what vLLM serves beside models, around an output processor."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.instrumentator import register_instrumentator_api_routers
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.output_processor import OutputProcessor

from moescope_service.api.plugin import MoescopeEndpoints
from moescope_service.vllm_contract import compat


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = FlexibleArgumentParser()
    compat.add_serve_arguments(parser)
    return parser


def server_args(api_key: Any = None, allowed_origins: Any = None) -> argparse.Namespace:
    """Return what vLLM's app reads of its command line."""
    default = _parser().get_default("allowed_origins")
    origins = default if allowed_origins is None else allowed_origins
    return argparse.Namespace(
        api_key=api_key, enable_request_id_headers=True, middleware=[], allowed_origins=origins,
        allow_credentials=False, allowed_methods=["*"], allowed_headers=["*"],
        log_error_stack=False, root_path="", enable_offline_docs=False, disable_fastapi_docs=False,
    )  # fmt: skip


def make_app(args: argparse.Namespace, output_processor: OutputProcessor, **post: Any) -> FastAPI:
    """Return the app.

    Args:
        args: See `server_args`.
        output_processor: The front end's.
        post: Endpoints to post to under ``/v1``, by name.
    """
    plugin = MoescopeEndpoints()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        client = SimpleNamespace(output_processor=output_processor)
        await plugin.init_state(client, app.state, args)
        yield
        for one in (app.state.moescope_collector, app.state.moescope_archive):
            if one is not None:
                one.close()

    app = FastAPI(lifespan=lifespan)
    app.state.args = args
    register_instrumentator_api_routers(app)
    for name, endpoint in post.items():
        app.post(f"/v1/{name}")(endpoint)
    attach_endpoint_plugins(app, ("generate",))  # finds ours by its entry point
    init_exception_handler(app)
    init_entrypoints_middleware(args, app, ("generate",))
    return app
