"""moescope's endpoints as a vLLM endpoint plugin."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import Depends, FastAPI

from moescope_service import runtime
from moescope_service.api import batch, experts, metrics, routes
from moescope_service.api.auth import require_api_key
from moescope_service.api.collector_client import CollectorClient
from moescope_service.api.registration import Registration, RequestScopeMiddleware
from moescope_service.settings import Settings, is_enabled


class MoescopeEndpoints:
    """Adds moescope's endpoints to vLLM's app, and tells the collector of every request.

    Source: vLLM 0.32.0, ``plugins/endpoint_plugins/interface.py`` (``EndpointPlugin``).
    """

    name = "moescope"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register the endpoints and the middleware; called before the app is served."""
        if not is_enabled():
            return
        guard = [Depends(require_api_key(app.state.args))]
        app.include_router(routes.router, dependencies=guard)
        app.include_router(batch.router, dependencies=guard)
        app.include_router(experts.router, dependencies=guard)
        app.include_router(metrics.router)
        app.add_middleware(RequestScopeMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Connect to the collector; called in the app's event loop, before requests are taken.

        Raises:
            RefusedError: A worker did not say hello: its routes would be missing.
        """
        if not is_enabled():
            return
        settings = Settings.from_env()
        collector = CollectorClient(runtime.collector_address())
        hello = await asyncio.to_thread(collector.wait_for_hello)
        state.moescope_collector = collector
        if settings.mode == "counts":
            return
        registration = Registration(collector, model=hello["model"], kept_share=settings.kept_share)
        registration.watch(engine_client.output_processor)
        state.moescope_registration = registration
