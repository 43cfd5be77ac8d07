"""Offline: ``vllm.LLM`` in a script, with no server.

``VLLM_LOG_MOE=routes.jsonl python script.py`` logs every finished request under its id, and
`routes` returns the traces in memory:

.. code-block:: python

    llm = vllm.LLM(model)
    outputs = llm.generate(prompts, sampling_params)
    for output, traces in zip(outputs, moescope_service.offline.routes(llm, outputs)):
        traces[0].topk_ids  # [num_tokens - 1, num_layers, top_k], of the first choice

Every ``LLMEngine`` has a collector of its own, which ends with it: request ids begin at 0 in each.

Relies on vLLM 0.32.0, ``v1/engine/llm_engine.py`` (``LLMEngine.__init__``, ``step``,
``abort_request``, ``output_processor``) and ``v1/engine/core_client.py``
(``InprocClient.engine_core``).
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moescope import paging
from moescope.trace import RouteTrace
from moescope_service import runtime
from moescope_service.errors import CollectorGoneError, RefusedError
from moescope_service.frontend.collector_client import QUERY_TIMEOUT_S, CollectorClient
from moescope_service.frontend.registration import Registration
from moescope_service.ids import short_id
from moescope_service.queries import RoutesQuery, SettleQuery, WaitQuery, Wanted
from moescope_service.settings import Settings
from moescope_service.token_text import TokenText
from moescope_service.vllm_contract.patching import wrap_once

logger = logging.getLogger("moescope")

SETTLE_TIMEOUT_S = 10.0
"""Longest wait for the traces of finished requests; they usually come within milliseconds."""

_CAPTURE = "_moescope_capture"
_MAX_EMPTY_STEPS = 8


def routes(llm: Any, outputs: Sequence[Any], *, tokens: bool = False) -> list[list[RouteTrace]]:
    """Return the routes of requests that a ``vllm.LLM`` has answered.

    Args:
        llm: A ``vllm.LLM`` or ``LLMEngine`` that was made with moescope switched on.
        outputs: Finished ``RequestOutput`` of this very object.
        tokens: Whether the traces have the text of their tokens.

    Returns:
        For each output the traces of its choices, in the order of ``output.outputs``. A request
        that opted out (``SamplingParams(extra_args={"moescope": "off"})``) has none.

    Raises:
        RuntimeError: Nothing is captured of this object, or the collector process is gone; or
            there is no tokenizer for ``tokens``.
        LookupError: The traces made room for newer ones.
        ValueError: An output is not of this object.
    """
    capture = getattr(getattr(llm, "llm_engine", llm), _CAPTURE, None)
    if capture is None:
        raise RuntimeError(
            f"no routes of this {type(llm).__name__} are captured: set MOESCOPE_ENABLE=1 before it "
            "is made, and name moescope in VLLM_PLUGINS where that is set"
        )
    return [capture.routes(output, tokens=tokens) for output in outputs]


def install(engine_class: Any) -> None:
    """Wrap ``LLMEngine``, which servers do not use; a second call does nothing."""
    step = engine_class.step

    def flushing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call_and_flush(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(self, *args, **kwargs)
            _flush(self, step)
            return result

        return call_and_flush

    wrap_once(engine_class, "__init__", _capturing)
    wrap_once(engine_class, "step", flushing)
    wrap_once(engine_class, "abort_request", flushing)


def _capturing(init: Callable[..., None]) -> Callable[..., None]:
    def init_and_capture(self: Any, *args: Any, **kwargs: Any) -> None:
        if Settings.from_env().mode == "counts":
            raise RefusedError(
                "MOESCOPE_ROUTES_MODE is counts, which a script has no server to ask for: leave it "
                "out, and add up the traces' counts()"
            )
        runtime.ensure_collector()
        try:
            init(self, *args, **kwargs)
            setattr(self, _CAPTURE, OfflineCapture(self, Settings.from_env()))
        except Exception as error:
            reason = runtime.reported_reason()
            runtime.release().end()  # the next engine gets a collector of its own
            if reason is not None and not isinstance(error, RefusedError):
                raise RefusedError(reason) from error
            raise

    return init_and_capture


def _flush(engine: Any, step: Callable[[Any], Any]) -> None:
    """Where no request runs any more, run the steps that tell the worker which ones ended."""
    for _ in range(_MAX_EMPTY_STEPS):
        if engine.output_processor.has_unfinished_requests() or not _has_ended_requests(engine):
            break
        step(engine)


def _has_ended_requests(engine: Any) -> bool:
    """Whether the worker has yet to hear which requests ended.

    An engine core in a process of its own runs an empty step for that; one in this process waits
    for the next request, which may never come.
    """
    core = getattr(engine.engine_core, "engine_core", None)
    return core is not None and (core.scheduler.has_requests() or bool(core.batch_queue))


class OfflineCapture:
    """Registers the requests of one ``LLMEngine``, and hands out their traces.

    Args:
        engine: An ``LLMEngine`` that has started; it is not kept alive.
        settings: What is captured.

    Raises:
        RefusedError: No worker introduced itself: nothing would be captured.
    """

    def __init__(self, engine: Any, settings: Settings) -> None:
        self._collector = CollectorClient(runtime.link_address())
        try:
            spec = self._collector.wait_for_workers()
        except RefusedError:
            self._collector.close()
            raise
        registration = Registration(
            self._collector, model=spec.model, kept_share=settings.kept_share
        )
        registration.watch(engine.output_processor)
        tokenizer = engine.output_processor.tokenizer
        self._text = None if tokenizer is None else TokenText(tokenizer)
        end = functools.partial(_end, self._collector, runtime.release(), os.getpid())
        # At exit the engine still runs when this is called: what was registered last comes first.
        finalizer = weakref.finalize(engine, end)
        finalizer.atexit = False
        atexit.register(finalizer)

    def routes(self, output: Any, *, tokens: bool = False) -> list[RouteTrace]:
        """Return the traces of one request; see `routes`."""
        if tokens and self._text is None:
            raise RuntimeError("this LLM has no tokenizer (skip_tokenizer_init): leave tokens out")
        self._collector.ask_and_wait(
            WaitQuery(request_ids=[short_id(output.request_id)], wait_s=SETTLE_TIMEOUT_S),
            timeout_s=SETTLE_TIMEOUT_S + QUERY_TIMEOUT_S,
        )
        traces = paging.driven(
            paging.all_pages(0), functools.partial(self._page, output.request_id)
        )
        if not traces:
            return []
        traces.sort(key=lambda trace: trace.index)
        _check_tokens(output, traces)
        return [self._text.added_to(one) for one in traces] if tokens and self._text else traces

    def _page(self, request_id: str, start: int) -> tuple[list[RouteTrace], int | None]:
        reply = self._collector.ask_and_wait(
            RoutesQuery(wanted=[Wanted(request_id=short_id(request_id), start=start)])
        )
        (found,) = reply.found
        if found.status == "evicted":
            raise LookupError(
                f"the routes of request {request_id!r} made room for newer ones: fetch them "
                "sooner, or set MOESCOPE_ROUTES_MEMORY"
            )
        if found.status == "lost":
            raise LookupError(
                f"the routes of request {request_id!r} are lost: the collector process hung for "
                "so long that the request's registration was given up"
            )
        if found.status == "running":
            raise LookupError(f"request {request_id!r} has not ended")
        return reply.traces(), found.next_start


def _check_tokens(output: Any, traces: Sequence[RouteTrace]) -> None:
    """Refuse traces of other tokens: every engine numbers its requests from 0."""
    prompt = output.prompt_token_ids or ()
    pairs = zip(output.outputs, traces, strict=False)
    if len(traces) != len(output.outputs) or not all(
        _has_tokens(trace, [*prompt, *choice.token_ids], with_prompt=bool(prompt))
        for choice, trace in pairs
    ):
        raise ValueError(
            f"the output {output.request_id!r} has other tokens or choices than the routes that "
            "this object has under that id: is it another LLM's?"
        )


def _has_tokens(trace: RouteTrace, tokens: list[int], *, with_prompt: bool) -> bool:
    if trace.token_ids is None or not with_prompt:
        return trace.num_tokens == len(tokens)
    return np.array_equal(trace.token_ids, tokens)


def _end(collector: CollectorClient, deployment: runtime.Deployment, owner: int) -> None:
    """Wait for the traces of what was answered, then end the collector, which writes the log."""
    if os.getpid() != owner:  # a forked engine core has its parent's objects
        return
    try:
        reply = collector.ask_and_wait(
            SettleQuery(wait_s=SETTLE_TIMEOUT_S), timeout_s=SETTLE_TIMEOUT_S + QUERY_TIMEOUT_S
        )
        if unsettled := reply.unsettled:
            logger.warning("the routes of %d sequences did not come in time", unsettled)
    except CollectorGoneError as error:
        logger.warning("routes may be lost: %s", error)
    collector.close()
    deployment.end()
