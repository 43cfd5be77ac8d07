"""moescope's endpoints as a vLLM endpoint plugin."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from moescope_service import runtime
from moescope_service.api import (
    batch,
    ended,
    expert_tokens,
    experts,
    follow,
    metrics,
    page,
    routes,
    watch,
    weights,
)
from moescope_service.api.auth import Keys
from moescope_service.api.browsers import Browsers
from moescope_service.api.request_scope import RequestScopeMiddleware
from moescope_service.api.sharing import SharedResponses
from moescope_service.api.streaming import Readers
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.frontend.registration import Registration
from moescope_service.settings import Settings, is_enabled
from moescope_service.token_text import TokenText
from moescope_service.vllm_contract.compat import allowed_origins, replace_route

_REFUSED: dict[int | str, dict[str, Any]] = {
    401: {"description": "The server wants an API key."},
    403: {"description": "A page of another site asks, or the key is not one that may do this."},
}


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
        app.state.moescope_settings = Settings.from_env()
        app.state.moescope_responses = SharedResponses()
        app.state.moescope_followers = Readers(follow.MAX_FOLLOWERS, "follow requests")
        app.state.moescope_watch = watch.Watch()
        app.state.moescope_ended = ended.Ended()
        # An id may be any path: routes' own come last.
        for module in (weights, follow, routes, batch, experts, expert_tokens, watch):
            app.include_router(module.router, responses=_REFUSED)
        app.include_router(page.router)
        replace_route(app, "/metrics")
        app.include_router(metrics.router)
        app.add_middleware(RequestScopeMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Connect to the collector; called in the app's event loop, before requests are taken.

        Raises:
            RefusedError: A worker did not introduce itself: its routes would be missing. Or users
                are to be kept apart who have no keys.
        """
        if not is_enabled():
            return
        settings: Settings = state.moescope_settings
        keys = Keys(args, settings, runtime.owner_salt())
        state.moescope_keys = keys
        state.moescope_browsers = Browsers(
            allowed_origins(args), settings.allowed_hosts or (), checks_host=keys.is_open
        )
        collector = CollectorClient(runtime.link_address())
        spec = await asyncio.to_thread(collector.wait_for_workers)
        state.moescope_collector = collector
        state.moescope_archive = None
        if settings.archive is not None:
            address = runtime.archive_address()
            state.moescope_archive = CollectorClient(address, is_archive=True)
        state.moescope_engine = engine_client
        state.moescope_token_text = None
        if settings.mode == "counts":
            return
        tokenizer = engine_client.output_processor.tokenizer  # None with --skip-tokenizer-init
        if tokenizer is not None:
            state.moescope_token_text = TokenText(tokenizer)
        registration = Registration(collector, model=spec.model, kept_share=settings.kept_share)
        registration.watch(engine_client.output_processor)
        state.moescope_registration = registration
